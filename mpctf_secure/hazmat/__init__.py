"""Thin wrappers over cryptography and PyNaCl; nothing above this package calls either for protocol work."""
