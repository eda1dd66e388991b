"""Makes pictures of one prompt with several presets, for the reports of `jitaccel view` and the app."""
