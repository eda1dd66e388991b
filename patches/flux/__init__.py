"""FLUX.1, FLUX.2 and Chroma: code shared by all their codebases, and packed execution."""
