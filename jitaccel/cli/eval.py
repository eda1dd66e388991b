"""Measure the quality of methods on held-out prompts of the embedded model, with intervals and paired tests."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CommandError

if TYPE_CHECKING:
    from ..scenes.judge import Judge
    from .comparison import Generation, Method

_BATCH = 6
_DEFAULT = "dense:50,dense:7,beta:6,beta:7,beta:11,4x,7x"
_DATA_PICTURES = 512

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("--prompts", type=int, default=48, metavar="N", help="how many held-out prompts to use")
    parser.add_argument(
        "--methods",
        default=_DEFAULT,
        help="separated by commas, the reference first: dense:N steps on native levels, beta:N on those of the "
        "presets, a preset, or a file with the fields of a JiTConfig in JSON",
    )
    parser.add_argument("--out", type=Path, default=Path("out/quality"), help="folder of rows, pictures and table")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; prompt k has seed + k")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: CUDA where there is one")


def run(arguments: argparse.Namespace) -> int:
    """Makes what is missing of the rows, then prints and writes the table."""
    if arguments.prompts < 2:
        raise CommandError(f"--prompts must be at least 2, got {arguments.prompts}")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise CommandError(f"--out must be a folder, got the file {arguments.out}")
    from .loading import load_judge, load_pipeline, pick_device
    from .methods import parse_methods

    methods = parse_methods(arguments.methods)
    device, judge = pick_device(arguments.device), load_judge()
    if judge is None:
        raise CommandError("the judge of the embedded model must be installed, got none; install jitaccel whole")

    from ..api import embedded_model
    from ..plan import file_digest
    from ..provenance import first_line, provenance

    print(first_line(device), flush=True)
    weights = embedded_model() / "transformer" / "diffusion_pytorch_model.safetensors"
    lab = _Lab(
        pipe=load_pipeline(None, device=arguments.device),
        judge=judge,
        methods=methods,
        seed=arguments.seed,
        folder=arguments.out,
        origin={**provenance(device), "weights": file_digest(weights)},
    )
    rows = lab.rows(arguments.prompts)

    from .eval_table import table

    text = table(rows, [method.name for method in methods], lab.data_features())
    (arguments.out / "table.md").write_text(text)
    print(text, end="")
    print(f"wrote {arguments.out / 'table.md'}, rows and pictures beside it")
    return 0


@dataclass(frozen=True, kw_only=True)
class _Lab:
    """Makes rows, one for each method and prompt, and keeps them with their pictures, so that a run can be taken up."""

    pipe: Any
    judge: Judge
    methods: tuple[Method, ...]
    seed: int
    folder: Path
    origin: Row

    def rows(self, count: int) -> list[Row]:
        """Returns the rows of the first `count` prompts; what these weights and this commit made before is kept."""
        import torch
        from tqdm import tqdm

        from ..scenes.prompts import held_out
        from .comparison import generate, warm_up
        from .loading import EMBEDDED_TEXT_TOKENS, picture_side

        prompts = held_out(count)
        self.folder.mkdir(parents=True, exist_ok=True)
        done = {(row["method"], row["prompt_index"]): row for row in self._read()}
        self.pipe.set_progress_bar_config(disable=True)
        side = picture_side(self.pipe)
        call = {"height": side, "width": side, "max_sequence_length": EMBEDDED_TEXT_TOKENS, "output_type": "np"}
        missing = [[k for k in range(count) if (method.name, k) not in done] for method in self.methods]
        if any(missing):
            warm_up(self.pipe, prompt=prompts[0][0], **call)
        total = sum(method.steps * -(-len(some) // _BATCH) for method, some in zip(self.methods, missing, strict=True))
        with tqdm(total=total, unit="step", leave=False) as bar, (self.folder / "rows.jsonl").open("a") as file:
            for method, some in zip(self.methods, missing, strict=True):
                bar.set_description(method.name)
                for start in range(0, len(some), _BATCH):
                    chosen = some[start : start + _BATCH]
                    generators = [torch.Generator().manual_seed(self.seed + k) for k in chosen]
                    texts = [prompts[k][0] for k in chosen]
                    made = generate(self.pipe, method, bar.update, prompt=texts, generator=generators, **call)
                    for row in self._judged(method, chosen, made, [prompts[k] for k in chosen]):
                        done[method.name, row["prompt_index"]] = row
                        file.write(json.dumps(row) + "\n")
                    file.flush()
        return [done[method.name, k] for method in self.methods for k in range(count)]

    def _read(self) -> Iterator[Row]:
        path = self.folder / "rows.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        known = {method.name: json.loads(json.dumps(_settings(method))) for method in self.methods}
        same = {"seed": self.seed, **{name: self.origin[name] for name in ("commit", "device", "torch", "weights")}}
        for line in lines:
            row = json.loads(line)
            is_same = all(row.get(name) == value for name, value in same.items())
            if (
                is_same
                and row["config"] == known.get(row["method"])
                and self._path(row["method"], row["prompt_index"]).exists()
            ):
                yield row

    def _path(self, method: str, prompt: int) -> Path:
        return self.folder / "pictures" / method.replace(":", "-") / f"{prompt:04d}.png"

    def _judged(
        self, method: Method, chosen: Sequence[int], made: Generation, prompts: Sequence[tuple[str, Any]]
    ) -> Iterator[Row]:
        import numpy as np
        from PIL import Image

        from ..quality import metrics
        from ..scenes.judge import compare
        from .pictures import psnr_db, to_bytes

        pictures = np.stack([to_bytes(picture) for picture in made.pictures])
        references = pictures
        if method is not self.methods[0]:
            paths = [self._path(self.methods[0].name, k) for k in chosen]
            references = np.stack([np.asarray(Image.open(path)) for path in paths])
        features, sightings = self.judge.features(pictures), self.judge(pictures)
        of_references = features if references is pictures else self.judge.features(references)
        for place, (k, (text, claims)) in enumerate(zip(chosen, prompts, strict=True)):
            path = self._path(method.name, k)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pictures[place]).save(path)
            score = compare(sightings[place], claims)
            picture, reference = (each[place] / 255.0 for each in (pictures, references))
            beside = {} if references is pictures else {
                "psnr_db": psnr_db(picture, reference),
                "ssim": metrics.ssim(picture, reference),
                "perceptual": metrics.perceptual_distance(features[place], of_references[place]),
                "spectrum_db": metrics.spectrum_error_db(picture, reference),
            }  # fmt: skip
            stages = _stages(made, place)
            yield {
                "benchmark": "quality",
                "method": method.name,
                "steps": method.steps,
                "config": _settings(method),
                "prompt_index": k,
                "prompt": text,
                "seed": self.seed,
                "claimed": score.claimed.total(),
                "shown": score.shown.total(),
                **beside,
                "seam": None if stages is None else metrics.seam_ratio(picture, stages),
                "features": [round(float(value), 5) for value in features[place].mean(axis=(1, 2))],
                "denoise_s": made.denoise_s / len(chosen),
                "gflop": made.flops / len(chosen) / 1e9,
                "token_steps": made.token_steps,
                **self.origin,
            }

    def data_features(self) -> Any:
        """Returns the mean features (P, F) of drawn scenes that nothing was trained on."""
        import numpy as np

        from ..scenes.draw import draw
        from ..scenes.scene import random_scene

        rng = np.random.default_rng([0x64617461, 0])  # a stream of its own: "data"
        found = []
        for _ in range(_DATA_PICTURES // 16):
            drawn = np.stack([draw(random_scene(rng)) for _ in range(16)])
            found.append(self.judge.features(np.clip(drawn, 0.0, 1.0)).mean(axis=(2, 3)))
        return np.concatenate(found)


def _settings(method: Method) -> Row | None:
    return None if method.config is None else method.config.to_dict()


def _stages(made: Generation, image: int) -> Any:
    """Returns in which stage each token of a picture was activated, (grid_h, grid_w); None where all were at once."""
    import numpy as np

    if made.stats is None or len(made.stats.anchors) < 2:
        return None
    height, width = made.stats.grid
    stages = np.zeros(height * width, int)
    for stage, anchors in reversed([*enumerate(made.stats.anchors)]):
        stages[anchors[image].cpu().numpy()] = stage
    return stages.reshape(height, width)
