"""Config files as frozen models; `load` alone reads files."""
