"""Reports: a generation, or several next to each other, as one HTML file with a slider over the steps.

    handle = jitaccel.apply(pipe, preset="7x").record()
    image = pipe("a lighthouse at dawn").images[0]
    handle.report("report.html")
"""

from __future__ import annotations

from .page import write_report
from .playback import Playback

__all__ = ["Playback", "write_report"]
