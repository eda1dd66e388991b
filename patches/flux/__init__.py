"""FLUX.1, FLUX.2 and Chroma: what their codebases share, and packed execution."""
