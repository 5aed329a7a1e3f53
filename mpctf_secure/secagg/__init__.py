"""Secure aggregation: Bonawitz et al. 2017 in its malicious-server form, as state machines without I/O."""
