"""A Space: `jitaccel app` on the embedded model. The requirements are in requirements.txt."""

from jitaccel.app.page import build
from jitaccel.app.studio import Studio

demo = build(Studio.open())

if __name__ == "__main__":
    demo.launch()
