"""Compare 50 dense steps, the dense control, 4x, 7x and 7x-paper on the embedded model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .limits import check_numbers
from .outputs import check_folder, save_picture

if TYPE_CHECKING:
    from ..evaluation.comparison import Method, TimedCall
    from ..evaluation.scenes.captions import Claims
    from ..evaluation.scenes.judge import Judge, Score

_BATCH = 4
_SHOWN_TOKENS = 3
_TOKENS_OF = "7x-paper"  # the preset that activates tokens by importance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("--prompts", type=int, default=4, metavar="N", help="number of held-out prompts")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for demo.png and tokens.png")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise; prompt k uses seed + k")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: CUDA if present")


@dataclass(kw_only=True)
class _Result:
    """All results of one method, batch by batch."""

    method: Method
    generations: list[TimedCall]

    @property
    def pictures(self) -> list[Any]:
        return [picture for generation in self.generations for picture in generation.pictures]

    def total(self, name: str) -> float:
        return float(sum(getattr(generation, name) for generation in self.generations))


def run(arguments: argparse.Namespace) -> int:
    """Prints the table and writes the two pictures."""
    check_numbers(arguments)
    check_folder(arguments.out)
    from ..evaluation.judging import load_judge
    from ..loading import load_pipeline, pick_device

    device = pick_device(arguments.device)

    from ..evaluation.scenes.prompts import held_out
    from ..provenance import first_line

    print(first_line(device), flush=True)
    pipe = load_pipeline(None, device=arguments.device)
    prompts = held_out(arguments.prompts)
    results = _generate(pipe, [text for text, _ in prompts], arguments.seed)
    scores = _scores(load_judge(), results, [claims for _, claims in prompts])
    for line in table(results, scores):
        print(line)
    for name, sheet in (("demo.png", _demo_sheet(results, prompts)), ("tokens.png", _token_sheet(results, prompts))):
        save_picture(sheet, arguments.out / name)
        print(f"wrote {arguments.out / name}")
    return 0


def _generate(pipe: Any, prompts: Sequence[str], seed: int) -> list[_Result]:
    """Makes the same pictures with every method; within each batch, one method after the other."""
    import torch
    from tqdm import tqdm

    from ..evaluation.comparison import Method, compared_methods, generate, warm_up
    from ..loading import EMBEDDED_TEXT_TOKENS, picture_side
    from ..method.presets import PRESETS
    from ..patches import cost_of

    pipe.set_progress_bar_config(disable=True)
    side = picture_side(pipe)
    num_tokens = (side // (2 * pipe.vae_scale_factor)) ** 2
    call = {"height": side, "width": side, "max_sequence_length": EMBEDDED_TEXT_TOKENS, "output_type": "np"}
    paper = PRESETS[_TOKENS_OF]
    methods = (
        *compared_methods(cost_of(pipe), num_tokens, EMBEDDED_TEXT_TOKENS),
        Method(name=_TOKENS_OF, steps=int(paper.steps), config=paper),
    )
    results = [_Result(method=method, generations=[]) for method in methods]
    numbered = list(enumerate(prompts))
    batches = [numbered[start : start + _BATCH] for start in range(0, len(numbered), _BATCH)]
    warm_up(pipe, prompt=list(prompts[:_BATCH]), **call)
    with tqdm(total=len(batches) * sum(method.steps for method in methods), unit="step") as bar:
        for batch in batches:
            for result in results:
                bar.set_description(result.method.name)
                generators = [torch.Generator().manual_seed(seed + k) for k, _ in batch]
                texts = [text for _, text in batch]
                generation = generate(pipe, result.method, bar.update, prompt=texts, generator=generators, **call)
                result.generations.append(generation)
    return results


def _scores(judge: Judge | None, results: list[_Result], claims: Sequence[Claims]) -> list[Score] | None:
    if judge is None:
        return None
    import numpy as np

    from ..evaluation.scenes.judge import Score, compare

    scores = []
    for result in results:
        found = judge(np.stack(result.pictures))
        scores.append(sum((compare(seen, said) for seen, said in zip(found, claims, strict=True)), Score()))
    return scores


_HEADER = (
    "method", "steps", "token-steps", "GFLOP", "=dense", "denoise s", "whole s", "vs 50 (FLOP)", "vs control (FLOP)",
    "PSNR dB", "attributes",
)  # fmt: skip


def table(results: Sequence[_Result], scores: Sequence[Score] | None) -> list[str]:
    """Returns the lines of the table and the notes on its columns. All figures are per picture."""
    dense, control = (next(r for r in results if r.method.name == name) for name in ("dense", "control"))
    rows: list[tuple[str, ...]] = [_HEADER]
    for index, result in enumerate(results):
        rows.append(_row(result, dense, control, scores[index] if scores else None))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    judged = "unknown, because no judge is installed."
    if scores:
        judged = f"share shown, by the judge, of the {scores[0].claimed.total()} that the prompts claim."
    return [
        *lines,
        "Per picture. GFLOP: transformer, including attention and text; =dense: dense steps of equal cost.",
        "control: dense steps that cost as much as 7x, with its levels and solver. Speed-ups are of denoising.",
        f"PSNR: to the picture of 50 steps from the same noise. attributes: {judged}",
    ]


def _row(result: _Result, dense: _Result, control: _Result, score: Score | None) -> tuple[str, ...]:
    count = len(result.pictures)
    flops, seconds = result.total("flops"), result.total("denoise_s")
    return (
        result.method.name,
        str(result.method.steps),
        str(result.generations[0].token_steps),
        f"{flops / count / 1e9:.1f}",
        f"{flops / dense.total('flops') * dense.method.steps:.2f}",
        f"{seconds / count:.3f}",
        f"{result.total('whole_s') / count:.3f}",
        *(
            f"{other.total('denoise_s') / seconds:.2f}x ({other.total('flops') / flops:.2f}x)"
            for other in (dense, control)
        ),
        "" if result is dense else f"{_mean_psnr_db(result, dense):.2f}",
        "" if score is None else f"{100 * score.accuracy:.1f} %",
    )


def _mean_psnr_db(result: _Result, reference: _Result) -> float:
    from ..evaluation.quality.metrics import psnr_db

    pairs = zip(result.pictures, reference.pictures, strict=True)
    return sum(psnr_db(picture, other) for picture, other in pairs) / len(result.pictures)


def _demo_sheet(results: list[_Result], prompts: Sequence[tuple[str, Any]]) -> Any:
    from ..evaluation.pictures import grid_picture

    columns = [f"{result.method.name}: {result.method.steps} steps" for result in results]
    rows = list(zip(*(result.pictures for result in results), strict=True))
    return grid_picture(rows, columns, [text for text, _ in prompts])


def _token_sheet(results: list[_Result], prompts: Sequence[tuple[str, Any]]) -> Any:
    from ..evaluation.pictures import grid_picture, show_stage
    from ..method.grid import num_tokens_of

    sparse = next(result for result in results if result.method.name == _TOKENS_OF)
    first = sparse.generations[0]
    assert first.stats is not None
    stats = first.stats
    labels, total = [], num_tokens_of(stats.grid)
    for stage, anchors in enumerate(stats.anchors):
        steps = [step.index for step in stats.steps if step.stage == stage]
        when = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]}-{steps[-1]}"
        labels.append(f"{_TOKENS_OF}, {when}: {anchors.shape[1]} of {total} tokens")
    rows = [
        [show_stage(picture, stats, stage, index) for stage in range(len(stats.anchors))]
        for index, picture in enumerate(first.pictures[:_SHOWN_TOKENS])
    ]
    return grid_picture(rows, labels, [text for text, _ in prompts])
