"""Fine-tune one language model across organisations whose updates nobody sees."""

__version__ = "0.1.0"
