"""How diffusers drives a model: pipelines, schedulers, hooks, and bare transformers."""
