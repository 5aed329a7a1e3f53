"""Who the organisations are: keys, certificates and the roster that all of them signed."""
