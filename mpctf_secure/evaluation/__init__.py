"""How good adapters are on held-out rows."""
