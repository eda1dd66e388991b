"""Makes the embedded model: `python -m training STEP --run DIR`, the steps in this order.

    text         tokenizers and text encoders            (4 minutes on two cores)
    small        transformer on pictures of 128 pixels   (an hour or more on two cores; resumes where it stopped)
    large        transformer on pictures of 256 pixels   (the same; starts from `small`)
    autoencoder  decoder of the autoencoder              (5 minutes)
    judge        attribute classifier                    (6 minutes)
    assemble     puts all into assets/tiny-flux

All but `assemble` write below DIR, outside the checkout; the transformer's phases can be stopped and started again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from jitaccel import embedded_model
from jitaccel.scenes.judge import Judge

from .assemble import assemble, save
from .card import write_card
from .decoder import train_decoder
from .judge import train_judge
from .text import train_text
from .transformer import Phase, train_transformer

TEXT_UPDATES = 1400
DECODER_UPDATES = 600
SMALL = Phase(picture_px=128, num_pictures=10_000, batch=16, updates=8_000)
LARGE = Phase(picture_px=256, num_pictures=4_000, batch=8, updates=6_000, decay_updates=1_500, seed=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["text", "small", "large", "autoencoder", "judge", "assemble"])
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints, outside the checkout")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--updates", type=int, help="stop the transformer's phase after this many updates")
    parser.add_argument("--start", type=Path, help="folder of weights to start the phase from")
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
        pipeline = assemble(run / "text", run / "vae", run / "large" / "ema")
        save(pipeline, embedded_model())
        Judge.load(run / "judge").save(embedded_model() / "judge")
        logs = [run / "text" / "text.jsonl", run / "vae.jsonl"]
        write_card(embedded_model(), pipeline.transformer, [run / "small", run / "large"], logs)
    else:
        phase, start = (SMALL, None) if options.step == "small" else (LARGE, run / "small" / "ema")
        train_transformer(run / options.step, phase.stopping_after(options.updates), options.start or start)


if __name__ == "__main__":
    main()
