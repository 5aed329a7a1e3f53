"""Logs that nobody changes unnoticed; AUDIT.md says who writes what, who checks it, and what is on disk when."""
