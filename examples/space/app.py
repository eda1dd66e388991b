"""A Hugging Face Space that runs `jitaccel app` with the embedded model. requirements.txt lists its requirements."""

from jitaccel.app.page import build
from jitaccel.app.studio import Studio
from jitaccel.loading import load_pipeline

demo = build(Studio(load_pipeline(None), None))

if __name__ == "__main__":
    demo.launch()
