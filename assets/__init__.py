"""Package data: the embedded pipeline, in tiny-flux/. `importlib.resources.files("jitaccel.assets")` finds it."""
