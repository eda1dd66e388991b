"""Runs a network on a subset of its tokens: packed sequences, attention, compiled and captured stages."""
