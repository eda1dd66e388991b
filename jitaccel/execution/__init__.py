"""How a network runs on some of its tokens: packed sequences, attention, compiled and captured stages."""
