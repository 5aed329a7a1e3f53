"""The coordinator's process: it runs the rounds and learns only sums. It never imports torch."""
