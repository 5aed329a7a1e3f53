"""What coordinator and participants must compute alike: contract, model state, round parameters, the next state."""
