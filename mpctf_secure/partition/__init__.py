"""Which rows a participant trains on in which round: pure and recomputable."""
