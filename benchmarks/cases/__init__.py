"""One module for each group of cases, found by `benchmarks.registry`."""
