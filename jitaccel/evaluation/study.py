"""Makes the pictures of `jitaccel eval` and stores a row for each, so that an interrupted run can continue."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .. import loading
from ..api import embedded_model
from ..artefacts.manifest import file_digest
from ..errors import CommandError
from ..files import whole
from .judging import judge_folder, load_judge
from .quality.rows import Row, settings_as_now

if TYPE_CHECKING:
    from .comparison import Method, TimedCall
    from .prompts import Prompt
    from .scenes.judge import Judge

EMBEDDED = "embedded"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The settings shared by all rows of a run.

    model: None for the embedded one. size: None for the pipeline's default. pickle: whether to accept weights in other
    formats than safetensors.
    """

    model: str | None
    device: Any
    dtype: str
    size: tuple[int, int] | None
    guidance: float | None
    text_tokens: int | None
    seed: int
    batch: int
    pickle: bool = False

    @property
    def is_judged(self) -> bool:
        """Whether the model comes with a judge of drawn landscapes, as the embedded one does."""
        return self.model is None or judge_folder(self.model) is not None

    @property
    def fields(self) -> Row:
        """The settings as rows store them, which must match; without the size, which may be the pipeline's default."""
        name = EMBEDDED if self.model is None else self.model
        return {
            "seed": self.seed,
            "model": name,
            "dtype": self.dtype,
            "guidance": self.guidance,
            "text_tokens": self.text_tokens,
        }

    def load(self) -> Any:
        """Returns the pipeline. Raises CommandError if it cannot be loaded or cannot make pictures of that size."""
        pipe = loading.load_pipeline(self.model, self.dtype, str(self.device), pickle=self.pickle)
        pipe.set_progress_bar_config(disable=True)
        unit = 2 * getattr(pipe, "vae_scale_factor", 8)
        if self.size is not None and any(side % unit for side in self.size):
            height, width = self.size
            raise CommandError(f"--size must be of multiples of {unit} pixels for this model, got {height}x{width}")
        return pipe

    def call(self, pipe: Any) -> dict[str, Any]:
        """Returns the arguments of the pipeline's call that are the same for every picture."""
        call: dict[str, Any] = {"output_type": "np"}
        size = self.size
        if size is None and self.is_judged:
            size = (loading.picture_side(pipe),) * 2
        elif size is None and isinstance(getattr(pipe, "default_sample_size", None), int):
            size = (pipe.default_sample_size * pipe.vae_scale_factor,) * 2
        if size is not None:
            call["height"], call["width"] = size
        if self.guidance is not None:
            call["guidance_scale"] = self.guidance
        if self.text_tokens is not None:
            call["max_sequence_length"] = self.text_tokens
        return call


@dataclass(frozen=True, kw_only=True)
class Study:
    """Makes rows, one for each method and prompt, and stores them with their pictures.

    judge: for prompts with claims. any_commit: also reuse rows made by other commits of this package.
    """

    setting: Setting
    methods: tuple[Method, ...]
    prompts: tuple[Prompt, ...]
    folder: Path
    origin: Row
    judge: Judge | None = None
    any_commit: bool = False

    def rows(self) -> list[Row]:
        """Returns the rows, method by method; rows already made with the same weights and settings are reused."""
        done = {(row["method"], row["prompt_index"]): row for row in self._kept()}
        count = len(self.prompts)
        missing = [[k for k in range(count) if (method.name, k) not in done] for method in self.methods]
        if any(missing):
            for row in self._made(missing):
                done[row["method"], row["prompt_index"]] = row
            self._free_memory()
        return [done[method.name, k] for method in self.methods for k in range(count)]

    def path(self, row: Mapping[str, Any]) -> Path:
        """Returns the path of the picture of a row."""
        return self._path(row["method"], row["prompt_index"])

    def _path(self, method: str, prompt: int) -> Path:
        return self.folder / "pictures" / method.replace(":", "-") / f"{prompt:04d}.png"

    def _kept(self) -> Iterator[Row]:
        settings = {method.name: json.loads(json.dumps(method.settings)) for method in self.methods}
        texts = {k: prompt.text for k, prompt in enumerate(self.prompts)}
        for row in read_lines(self.folder / "rows.jsonl"):
            if not _is_row(row):
                continue
            if (
                row["method"] in settings
                and settings_as_now(row["config"] or {}) == (settings[row["method"]] or {})
                and row["prompt"] == texts.get(row["prompt_index"])
                and self._is_same(row)
                and self._is_size(row)
                and self._has_picture(row)
            ):
                yield {name: value for name, value in row.items() if name not in _SCORED_BEFORE}

    def _is_same(self, row: Row) -> bool:
        """Whether the row was made under the settings of this run, apart from the method."""
        names = _ORIGIN if self.any_commit else ("commit", *_ORIGIN)
        same = {**self.setting.fields, **{name: self.origin[name] for name in names}}
        defaults = {**_BEFORE_MODELS, "dtype": dtype_of("auto", self.setting.device), "judge": same["judge"] or "some"}
        return all(row.get(name, defaults.get(name)) == value for name, value in same.items())

    def _is_size(self, row: Row) -> bool:
        size = self.setting.size
        asked = row.get("size")
        return asked == (None if size is None else list(size)) or (size is not None and row.get("pixels") == [*size])

    def _has_picture(self, row: dict[str, Any]) -> bool:
        """Whether the row's picture exists and was not replaced by a later one."""
        path = self.path(row)
        found = file_digest(path) if path.exists() else None
        return found is not None and bool(row.setdefault("picture", found) == found)

    def _made(self, missing: Sequence[Sequence[int]]) -> Iterator[Row]:
        import torch
        from tqdm import tqdm

        from .comparison import generate, warm_up

        pipe = self.setting.load()
        origin = {**self.origin, "weights": self._loaded_weights()}
        call, batch = self.setting.call(pipe), self.setting.batch
        warm_up(pipe, prompt=self.prompts[0].text, **call)
        total = sum(method.steps * -(-len(some) // batch) for method, some in zip(self.methods, missing, strict=True))
        self.folder.mkdir(parents=True, exist_ok=True)
        with tqdm(total=total, unit="step", leave=False) as bar, append_lines(self.folder / "rows.jsonl") as file:
            for method, some in zip(self.methods, missing, strict=True):
                bar.set_description(method.name)
                for start in range(0, len(some), batch):
                    chosen = some[start : start + batch]
                    generators = [torch.Generator().manual_seed(self.setting.seed + k) for k in chosen]
                    texts = [self.prompts[k].text for k in chosen]
                    made = generate(pipe, method, bar.update, prompt=texts, generator=generators, **call)
                    for row in self._noted(method, chosen, made, origin):
                        file.write(json.dumps(row) + "\n")
                        yield row
                    file.flush()

    def _loaded_weights(self) -> str | None:
        """Returns the identity of the loaded weights; loading from a hub may have fetched newer ones than before."""
        found, known = weights_digest(self.setting.model), self.origin["weights"]
        if known not in (None, found):
            raise CommandError(f"--model must stay as it is, got other weights of {self.setting.model}; run again")
        return found

    def _noted(self, method: Method, chosen: Sequence[int], made: TimedCall, origin: Row) -> Iterator[Row]:
        """Saves the pictures of one call and yields their rows."""
        from .pictures import to_bytes
        from .quality.metrics import seam_ratio

        pictures = np.stack([to_bytes(picture) for picture in made.pictures])
        judged = self._judged(pictures, chosen)
        for place, k in enumerate(chosen):
            path = self._path(method.name, k)
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path) as partial:
                Image.fromarray(pictures[place]).save(partial)
            stages = _stages(made, place)
            yield {
                "benchmark": "quality",
                "method": method.name,
                "steps": method.steps,
                "config": method.settings,
                "prompt_index": k,
                "prompt": self.prompts[k].text,
                **self.setting.fields,
                "size": self.setting.size,
                "pixels": pictures.shape[1:3],
                "picture": file_digest(path),
                **judged[place],
                "seam": None if stages is None else seam_ratio(pictures[place] / 255.0, stages),
                "denoise_s": made.denoise_s / len(chosen),
                "gflop": made.flops / len(chosen) / 1e9,
                "token_steps": made.token_steps,
                **origin,
            }

    def _judged(self, pictures: Any, chosen: Sequence[int]) -> list[Row]:
        """Returns the judge's fields for each picture; empty if there is no judge."""
        if self.judge is None:
            return [{} for _ in chosen]
        from .scenes.judge import compare

        features = self.judge.features(pictures).mean(axis=(2, 3))
        rows: list[Row] = []
        for k, seen, own in zip(chosen, self.judge(pictures), features, strict=True):
            score = compare(seen, self.prompts[k].claims or {})
            rounded = [round(float(value), 5) for value in own]
            rows.append({"claimed": score.claimed.total(), "shown": score.shown.total(), "features": rounded})
        return rows

    def _free_memory(self) -> None:
        """Frees the pipeline's memory, which scoring may need."""
        import torch

        gc.collect()
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()


_ORIGIN = ("device", "torch", "weights", "judge")
# Values of fields that rows lack if they were made before models could be chosen.
_BEFORE_MODELS: Row = {"model": EMBEDDED, "guidance": None, "text_tokens": loading.EMBEDDED_TEXT_TOKENS}
_SCORED_BEFORE = ("psnr_db", "ssim", "perceptual", "spectrum_db")  # scores that such rows hold themselves


def dtype_of(name: str, device: Any) -> str:
    """Returns the dtype that `--dtype` selects on a device, as `load_pipeline` does."""
    if name != "auto":
        return name
    return "bfloat16" if device.type == "cuda" else "float32"


def weights_digest(model: str | None) -> str | None:
    """Returns an identity of a model's weights, or None for a hub model that is not in the cache yet.

    For the embedded model, a digest of the transformer's weights; for a folder, a digest of its files' names, sizes and
    times; for a hub model, the commit.
    """
    if model is None:
        return file_digest(embedded_model() / "transformer" / "diffusion_pytorch_model.safetensors")
    folder = Path(model).expanduser()
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        listed = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "model_index.json")
    return Path(found).parent.name if isinstance(found, str) else None


def judge_of(setting: Setting, prompts: Sequence[Prompt]) -> tuple[Judge | None, str | None]:
    """Returns the judge and its digest if it applies: to square pictures of held-out prompts."""
    is_square = setting.size is None or setting.size[0] == setting.size[1]
    if not setting.is_judged or not is_square or any(prompt.claims is None for prompt in prompts):
        return None, None
    folder, judge = judge_folder(setting.model), load_judge(setting.model)
    if folder is None or judge is None:
        raise CommandError("the judge of the embedded model must be installed, got none; reinstall jitaccel")
    return judge, file_digest(folder / "judge.safetensors")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file of JSON lines; nothing if the file does not exist.

    Lines that are not JSON objects are skipped, such as a truncated line or one written by another program.
    """
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):  # includes UnicodeDecodeError
            continue
        if isinstance(found, dict):
            yield found


def _is_row(found: Mapping[str, Any]) -> bool:
    """Whether an object has the fields of a row; lines of other programs do not."""
    return (
        isinstance(found.get("method"), str)
        and isinstance(found.get("prompt"), str)
        and type(found.get("prompt_index")) is int
        and "config" in found
        and isinstance(found["config"], (dict, type(None)))
    )


def append_lines(path: Path) -> Any:
    """Returns a file opened for appending lines; if its last line was cut off, a line end is added first."""
    is_cut_off = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    file = path.open("a")
    if is_cut_off:
        file.write("\n")
    return file


def _stages(made: TimedCall, image: int) -> Any:
    """Returns the stage in which each token of a picture was activated, (grid_h, grid_w); None if all in one stage."""
    if made.stats is None or len(made.stats.anchors) < 2:
        return None
    height, width = made.stats.grid
    stages = np.zeros(height * width, int)
    for stage, anchors in reversed([*enumerate(made.stats.anchors)]):
        stages[anchors[image].cpu().numpy()] = stage
    return stages.reshape(height, width)
