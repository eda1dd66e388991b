"""How the embedded model was made: run `python -m training --help` for the order of the steps."""
