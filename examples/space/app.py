"""A Space: `jitaccel app` on the embedded model. The requirements are in requirements.txt."""

from jitaccel.app.page import build
from jitaccel.app.studio import Studio
from jitaccel.loading import load_pipeline

demo = build(Studio(load_pipeline(None), None))

if __name__ == "__main__":
    demo.launch()
