"""Local training: data, model, the torchrun job and its launcher."""
