"""A custom Euler loop that calls a network: the move is folded into the velocity it gets."""
