"""What is done with the mean update: elementwise arithmetic, so that every participant computes the same bits."""
