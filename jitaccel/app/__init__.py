"""Pictures of one prompt by several presets: what `jitaccel view` and the app make reports of."""
