"""The command line: `app` lists the verbs; what a verb does for people stands here, what it computes below."""
