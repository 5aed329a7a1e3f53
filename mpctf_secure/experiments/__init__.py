"""The demo: its model, its data, and the tiny model of the smoke run."""
