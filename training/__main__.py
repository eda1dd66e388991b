"""Makes the embedded model: `python -m training STEP --run DIR`, the steps in this order.

    pictures     draws the training pictures             (6 minutes on two cores; 3 GB)
    text         tokenizers and text encoders            (3 minutes on one core)
    small        transformer, mostly 16x16 tokens        (an hour on one core; resumes where it stopped)
    mixed        transformer, all sizes                  (starts from `small`)
    guided       builds guidance into the transformer    (starts from `mixed`)
    autoencoder  decoder of the autoencoder
    judge        attribute classifier
    assemble     puts all into assets/tiny-flux

All but `assemble` write below DIR, outside the checkout; the transformer's phases can be stopped and started again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from .parallel import launch
from .pictures import draw_sets
from .text import train_text
from .transformer import MIXED, SMALL, Phase, train_transformer

TEXT_UPDATES = 700
PHASES: Mapping[str, tuple[Phase, str | None]] = MappingProxyType(
    {
        "small": (Phase(shares=SMALL, updates=3_000), None),
        "mixed": (Phase(shares=MIXED, updates=3_000, decay_updates=1_000, seed=1), "small"),
        "guided": (
            Phase(
                shares=MIXED, updates=600, decay_updates=400, muon_rate=7e-4, adam_rate=4e-4, guidance=2.5, seed=2
            ),
            "mixed",
        ),
    }
)  # and where each starts from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["pictures", "text", *PHASES, "autoencoder", "judge", "assemble"])
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints, outside the checkout")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=1, help="processes that draw, or train the transformer together")
    parser.add_argument("--updates", type=int, help="stop the transformer's phase after this many updates")
    parser.add_argument("--start", type=Path, help="folder of weights to start the transformer's phase from")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run: Path = options.run
    if options.step == "pictures":
        draw_sets(run / "pictures", options.workers)
    elif options.step == "text":
        train_text(run / "text", TEXT_UPDATES)
    else:
        phase, before = PHASES[options.step]
        start = options.start or (None if before is None else run / before)
        launch(options.workers, train_transformer, run / options.step, phase.stopping_after(options.updates), start)


if __name__ == "__main__":
    main()
