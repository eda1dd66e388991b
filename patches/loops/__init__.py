"""Custom Euler loops that call a network: the method's move of the state is folded into the velocity they get."""
