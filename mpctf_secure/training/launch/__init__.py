"""Starting a participant's training job on its nodes: one generated script for each, whatever carries it there."""
