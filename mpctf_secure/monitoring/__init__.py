"""The event stream that everything a person watches is made of."""
