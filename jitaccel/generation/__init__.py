"""One generation, whoever drives it: its route, handle, statistics and times."""
