"""Makes a picture with the installed package and prints what ran: `python -I first_picture.py PICTURE LIBRARY...`.

release/wheel.py runs it in an environment that contains only the wheel and its requirements.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> None:
    """Writes the picture. Raises SystemExit if another copy of the package is imported, or if a library is missing."""
    import torch
    from diffusers import FluxPipeline

    import jitaccel
    from jitaccel import ops

    picture, wanted = Path(arguments[0]), set(arguments[1:])
    package = Path(jitaccel.__file__).parent
    if not package.is_relative_to(sys.prefix):
        sys.exit(f"first_picture: jitaccel must be imported from {sys.prefix}, got {package}")
    if torch.version.cuda is None:
        wanted.discard("cuda")
    if lacking := wanted - set(ops.compiled()):
        sys.exit(f"first_picture: {', '.join(sorted(lacking))} must load, got {ops.missing()}")
    pipe = FluxPipeline.from_pretrained(jitaccel.embedded_model())
    pipe.set_progress_bar_config(disable=True)
    with jitaccel.apply(pipe, preset="7x"):
        image = pipe(
            "a red circle", height=256, width=256, max_sequence_length=48, generator=torch.Generator().manual_seed(0)
        ).images[0]
    image.save(picture)
    lowest, highest = image.convert("L").getextrema()
    if highest - lowest < 32:
        sys.exit(f"first_picture: the picture must show something, got greys {lowest} to {highest}; see {picture}")
    sys.stdout.write(f"jitaccel {jitaccel.__version__} with {sorted(ops.compiled())} wrote {picture}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
