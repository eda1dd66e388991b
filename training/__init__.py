"""Makes the embedded model; `python -m training --help` shows the order of the steps."""
