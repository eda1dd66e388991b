"""Measures speed: `python -m benchmarks --help`."""
