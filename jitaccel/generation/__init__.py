"""Everything about one generation: its route through a step, its handle, statistics and timing."""
