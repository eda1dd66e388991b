"""Makes the embedded model: `python -m training STEP --run DIR`. Run the steps in this order:

    pictures     draws the training pictures             (6 minutes on two cores; 3 GB)
    text         tokenizers and text encoders            (3 minutes on one core)
    small        transformer, mostly 16x16 tokens        (an hour on one core)
    mixed        transformer, all sizes                  (starts from `small`)
    guided       builds guidance into the transformer    (starts from `mixed`)
    autoencoder  decoder of the autoencoder              (15 minutes on one core)
    judge        attribute classifier                    (15 minutes on one core)
    assemble     writes the model to assets/tiny-flux or --out; --start selects another phase, to try it out

All steps but `assemble` write into DIR, which is outside the checkout. The phases of the transformer can be stopped;
they resume where they stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from diffusers import AutoencoderKL

from jitaccel import embedded_model
from jitaccel.evaluation.scenes.judge import Judge

from .assemble import assemble, save
from .card import write_card
from .decoder import measure_psnr_db, train_decoder
from .judge import train_judge
from .parallel import launch
from .pictures import draw_sets
from .text import train_text
from .transformer import MIXED, SMALL, Phase, train_transformer

TEXT_UPDATES = 700
DECODER_UPDATES = 1_400
JUDGE_UPDATES = 1_200
PHASES: Mapping[str, tuple[Phase, str | None]] = MappingProxyType(
    {
        "small": (Phase(shares=SMALL, updates=3_000), None),
        "mixed": (Phase(shares=MIXED, updates=3_000, decay_updates=1_000, seed=1), "small"),
        "guided": (
            Phase(shares=MIXED, updates=600, decay_updates=400, muon_rate=7e-4, adam_rate=4e-4, guidance=2.5, seed=2),
            "mixed",
        ),
    }
)  # with the phase that each starts from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["pictures", "text", *PHASES, "autoencoder", "judge", "assemble"])
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints, outside the checkout")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=1, help="processes that draw or train together")
    parser.add_argument("--updates", type=int, help="stop the transformer's phase after this many updates")
    parser.add_argument("--start", type=Path, help="folder of the phase to start from, or to assemble")
    parser.add_argument("--out", type=Path, help="folder to assemble into; by default that of the embedded model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run: Path = options.run
    if options.step == "pictures":
        draw_sets(run / "pictures", options.workers)
    elif options.step == "text":
        train_text(run / "text", TEXT_UPDATES)
    elif options.step == "autoencoder":
        train_decoder(run, DECODER_UPDATES)
    elif options.step == "judge":
        train_judge(run, JUDGE_UPDATES)
    elif options.step == "assemble":
        _assemble(run, options.start or run / "guided", options.out or embedded_model())
    else:
        phase, before = PHASES[options.step]
        start = options.start or (None if before is None else run / before)
        launch(options.workers, train_transformer, run / options.step, phase.stopping_after(options.updates), start)


def _assemble(run: Path, last: Path, out: Path) -> None:
    """Writes a model with the transformer of phase `last`, and its card, into `out`."""
    pipeline = assemble(run / "text", run / "vae", last / "ema")
    save(pipeline, out)
    judge = Judge.load(run / "judge")
    judge.save(out / "judge")
    vae = AutoencoderKL.from_pretrained(run / "vae")
    psnr_db = {size: measure_psnr_db(vae, size) for size in (128, 256)}
    names = [*PHASES][: 1 + [*PHASES].index(last.name)] if last.name in PHASES else [*PHASES]
    phases = [run / name for name in names if (run / name / "log.jsonl").exists()]
    logs = [run / "text" / "text.jsonl", run / "vae.jsonl", run / "judge" / "judge.jsonl"]
    write_card(out, pipeline.transformer, judge, psnr_db, phases, logs, run / "faults.md")


if __name__ == "__main__":
    main()
