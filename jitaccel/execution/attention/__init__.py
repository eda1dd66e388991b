"""Attention within each document of a packed sequence, by whichever installed package provides it."""
