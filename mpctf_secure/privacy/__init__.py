"""Bounding what one participant contributes."""
