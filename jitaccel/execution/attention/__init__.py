"""Attention inside each document of a packed sequence, through whichever package has it."""
