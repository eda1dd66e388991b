"""Measure the quality of methods on prompts, of the embedded model or any other, with intervals and paired tests."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CommandError
from ..files import write_whole
from ..loading import EMBEDDED_TEXT_TOKENS
from . import options
from .limits import check_numbers, check_size
from .outputs import check_folder

if TYPE_CHECKING:
    from ..evaluation.prompts import Prompt
    from ..evaluation.quality.rows import Row
    from ..evaluation.quality.scorers import Scorer
    from ..evaluation.study import Setting, Study

_METHODS = "dense:50,dense:7,beta:7,dpm:4,dpm:6,dpm:12,4x,7x,10x"
_MODEL_METHODS = "dense:50,dense:28,dense:7,dpm:6,4x,7x"
_METRICS = "psnr,ssim,spectrum"
_BATCH = 6  # default for the embedded model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument(
        "--prompts",
        default="48",
        metavar="N|FILE",
        help="number of held-out prompts of drawn landscapes (for the embedded model, or one with its judge), or a "
        "file: .txt with one prompt per line, or .jsonl with a field prompt in each line",
    )
    parser.add_argument(
        "--methods",
        help="separated by commas, the reference first: dense:N steps on native levels, beta:N on those of the "
        "presets, dpm:N also with their solver, a preset, a JSON file with the fields of a JiTConfig, or a cache or "
        f"another rival (a wrong word lists their forms); if omitted, {_METHODS} (for --model "
        f"{_MODEL_METHODS})",
    )
    parser.add_argument(
        "--metrics",
        default=_METRICS,
        help="separated by commas: psnr, ssim, spectrum, and with the extra [eval] imagereward, clip-iqa, hpsv2, "
        "clip, lpips; or package.module:attribute for a custom metric",
    )
    options.add_model_options(parser, offload=False)
    options.add_size_option(parser)
    parser.add_argument("--guidance", type=float, help="embedded guidance of FLUX.1-dev; if omitted, the pipeline's")
    parser.add_argument(
        "--max-sequence-length",
        type=int,
        metavar="TOKENS",
        help=f"prompt length including padding; if omitted, the pipeline's (embedded: {EMBEDDED_TEXT_TOKENS})",
    )
    parser.add_argument("--batch-size", type=int, help=f"prompts per call; if omitted, 1 (embedded: {_BATCH})")
    parser.add_argument("--out", type=Path, default=Path("out/quality"), help="folder of rows, pictures and table")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise; prompt k uses seed + k")
    parser.add_argument("--any-commit", action="store_true", help="also reuse rows made by other commits")


def run(arguments: argparse.Namespace) -> int:
    """Makes the missing rows, computes the missing scores, then prints and writes the table."""
    size = _checked(arguments)
    from ..evaluation.methods import parse_methods
    from ..evaluation.prompts import read_prompts
    from ..loading import pick_device
    from ..provenance import first_line

    device = pick_device(arguments.device)
    setting = _setting(arguments, size, device)
    prompts = read_prompts(arguments.prompts, is_judged=setting.is_judged)
    methods = parse_methods(arguments.methods or (_METHODS if setting.is_judged else _MODEL_METHODS))
    from ..evaluation.scoring import parse_metrics, score_rows

    scorers = parse_metrics(arguments.metrics, str(device))
    study = _study(setting, prompts, methods, arguments.out, arguments.any_commit)
    scorers = (*scorers, *_of_judge(study))
    print(first_line(device), flush=True)
    made = study.rows()
    names = [method.name for method in methods]
    rows = score_rows(made, scorers, reference=names[0], picture_of=study.path, folder=arguments.out)
    _write(study, rows, names, scorers)
    return 0


def _write(study: Study, rows: Sequence[Row], names: Sequence[str], scorers: Sequence[Scorer]) -> None:
    from PIL import Image

    from ..evaluation.eval_pictures import known_qualities, write_pictures
    from ..evaluation.eval_table import paired, table
    from ..evaluation.quality.summary import summary

    def picture_of(method: str, prompt: int) -> Image.Image:
        return Image.open(study.path({"method": method, "prompt_index": prompt}))

    data = None if study.judge is None else study.judge.drawn
    known = known_qualities(scorers)
    records = summary(rows, names, data=data, known=known)
    text = table(rows, records, scorers, 0 if data is None else len(data))
    write_whole(study.folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(study.folder / "table.md", text)
    pairs = paired(rows, names, scorers)
    records = [{**record, "paired": pairs.get(record["method"], {})} for record in records]
    written = write_pictures(rows, records, study.folder, picture_of, known=known)
    print(text, end="")
    print(f"wrote table.md, results.jsonl, {', '.join(path.name for path in written)} and pictures into {study.folder}")


def _checked(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """Returns the requested size, (height, width). Raises CommandError for invalid arguments, listing every problem."""
    reasons = []
    checks: list[tuple[Callable[[Any], None], Any]] = [(check_numbers, arguments), (check_folder, arguments.out)]
    for check, given in checks:
        try:
            check(given)
        except CommandError as error:
            reasons.append(str(error))
    if reasons:
        raise CommandError("\n".join(reasons))
    if arguments.size is None:
        return None
    size = options.parse_size(arguments.size)
    check_size(size)
    return size


def _setting(arguments: argparse.Namespace, size: tuple[int, int] | None, device: Any) -> Setting:
    from ..evaluation.judging import judge_folder
    from ..evaluation.study import Setting, dtype_of

    is_known = arguments.model is None or judge_folder(arguments.model) is not None
    return Setting(
        model=arguments.model,
        pickle=arguments.pickle,
        device=device,
        dtype=dtype_of(arguments.dtype, device),
        size=size,
        guidance=arguments.guidance,
        text_tokens=arguments.max_sequence_length or (EMBEDDED_TEXT_TOKENS if is_known else None),
        seed=arguments.seed,
        batch=arguments.batch_size or (_BATCH if is_known else 1),
    )


def _study(
    setting: Setting, prompts: tuple[Prompt, ...], methods: tuple[Any, ...], folder: Path, any_commit: bool
) -> Study:
    from ..evaluation.study import Study, judge_of, weights_digest
    from ..provenance import provenance

    judge, digest = judge_of(setting, prompts)
    folder.mkdir(parents=True, exist_ok=True)
    return Study(
        setting=setting,
        methods=methods,
        prompts=prompts,
        folder=folder,
        origin={**provenance(setting.device), "weights": weights_digest(setting.model), "judge": digest},
        judge=judge,
        any_commit=any_commit,
    )


def _of_judge(study: Study) -> tuple[Scorer, ...]:
    """Returns the metrics that the judge provides."""
    if study.judge is None:
        return ()
    from ..evaluation.quality.scorers import perceptual

    return (perceptual(study.judge.features, version=study.origin["judge"]),)
