"""Makes the embedded model: `python -m training STEP --run DIR`, the steps in this order.

    text         tokenizers and text encoders            (4 minutes on two cores)
    windows      transformer on windows of pictures      (about an hour on two cores; resumes where it stopped)
    whole        transformer on whole pictures           (two hours on two cores; starts from `windows`)
    guided       builds guidance into the transformer    (half an hour on two cores; starts from `whole`)
    autoencoder  decoder of the autoencoder              (5 minutes)
    judge        attribute classifier                    (6 minutes)
    assemble     puts all into assets/tiny-flux

All but `assemble` write below DIR, outside the checkout; the transformer's phases can be stopped and started again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch

from jitaccel import embedded_model
from jitaccel.evaluation.scenes.judge import Judge

from .assemble import assemble, save
from .card import write_card
from .decoder import train_decoder
from .judge import train_judge
from .parallel import launch
from .text import train_text
from .transformer import Phase, train_transformer

TEXT_UPDATES = 1400
DECODER_UPDATES = 600
WINDOWS = Phase(window_tokens=256, num_pictures=12_000, batch=16, updates=3_040, alignment=0.5)
WHOLE = Phase(
    window_tokens=None,
    num_pictures=10_000,
    batch=8,
    updates=2_400,
    alignment=0.3,
    decay_updates=1_000,
    half_share=0.5,
    level_mean=1.6,
    seed=2,
)

GUIDED = replace(
    WHOLE, updates=440, muon_rate=7e-4, adam_rate=4e-4, decay_updates=260, half_share=0.0, guidance=2.5, seed=3
)
PHASES: Mapping[str, tuple[Phase, str | None]] = MappingProxyType(
    {"windows": (WINDOWS, None), "whole": (WHOLE, "windows"), "guided": (GUIDED, "whole")}
)  # and where each starts from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["text", *PHASES, "autoencoder", "judge", "assemble"])
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints, outside the checkout")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=1, help="processes that train the transformer together")
    parser.add_argument("--updates", type=int, help="stop the transformer's phase after this many updates")
    parser.add_argument("--start", type=Path, help="folder of weights to start the transformer's phase from")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run: Path = options.run
    if options.step == "text":
        train_text(run / "text", TEXT_UPDATES)
    elif options.step == "autoencoder":
        train_decoder(run / "vae", DECODER_UPDATES)
    elif options.step == "judge":
        train_judge(run / "judge")
    elif options.step == "assemble":
        pipeline = assemble(run / "text", run / "vae", run / "guided" / "ema")
        save(pipeline, embedded_model())
        Judge.load(run / "judge").save(embedded_model() / "judge")
        logs = [run / "text" / "text.jsonl", run / "vae.jsonl"]
        write_card(embedded_model(), pipeline.transformer, [run / name for name in PHASES], logs)
    else:
        phase, before = PHASES[options.step]
        start = options.start or (None if before is None else run / before)
        launch(options.workers, train_transformer, run / options.step, phase.stopping_after(options.updates), start)


if __name__ == "__main__":
    main()
