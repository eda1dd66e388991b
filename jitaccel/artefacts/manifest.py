"""The manifest of an exported folder: `manifest.json` for people, `manifest.safetensors` for programs.

The manifest lists every file with its SHA-256, and includes a checksum of itself, so that a folder that is damaged or
mixed from several exports is refused. The checksums protect against accidents only, because they are stored next to the
files; load only folders that you trust.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ArtefactError
from ..limits import MOST_BATCH, MOST_TEXT_TOKENS
from ..method.config import JiTConfig
from ..method.grid import num_tokens_of
from ..method.lift import blur_weights
from ..method.solver import make_solver

Format = Literal["aoti", "torchscript"]
VERSION = 3
_DTYPES = ("float32", "bfloat16", "float16")
JSON, TENSORS, WEIGHTS = "manifest.json", "manifest.safetensors", "weights.safetensors"


@dataclass(frozen=True)
class Input:
    """One input tensor of a stage: its name, shape, and dtype as torch names it ("float32")."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Input:
        """Returns the declaration that matches a tensor."""
        return cls(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def is_met_by(self, tensor: Tensor, device: str) -> bool:
        """Returns whether a tensor has this shape and dtype and is on this kind of device."""
        return Input.of(self.name, tensor) == self and tensor.device.type == device


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the stages in a folder compute, and the conditions they were exported for.

    Attributes:
        codebase: Name of the pipeline in statistics.
        format: "aoti" (native code) or "torchscript".
        config: Settings of the method.
        levels: Noise levels of the steps, including the final 0.
        tokens: Number of anchors of each stage.
        grid: Token grid of every call.
        batch: Images of every call.
        text_tokens: Prompt length of every call, including padding.
        inputs: Inputs of each stage, in order; the state (B, N, D) comes first.
        dtype: Dtype of states and weights.
        device: Device type that the stages run on.
        processor: Processor or GPU that they were compiled for.
        torch_version: Version of torch that compiled them.
        attention: Attention backend that is compiled in.
        operators: Device types whose compiled operators the stages call.
        model: Configuration of the network.
        files: SHA-256 of every other file, by name.
    """

    format: Format
    codebase: str
    config: JiTConfig
    levels: tuple[float, ...]
    tokens: tuple[int, ...]
    grid: tuple[int, ...]
    batch: int
    text_tokens: int
    inputs: tuple[tuple[Input, ...], ...]
    dtype: str
    device: str
    processor: str
    torch_version: str
    attention: str
    operators: tuple[str, ...]
    model: Mapping[str, Any]
    files: Mapping[str, str]

    @property
    def channels(self) -> int:
        """D, the channels of a token of the state."""
        return self.inputs[0][0].shape[2]

    @property
    def stage_files(self) -> tuple[str, ...]:
        """The stages' files, the sparsest first."""
        suffix = {"aoti": "pt2", "torchscript": "pt"}[self.format]
        return tuple(f"stage{stage}.{suffix}" for stage in range(len(self.tokens)))

    def write(self, folder: Path) -> None:
        """Writes `manifest.json`."""
        content = {"version": VERSION, **asdict(self), "config": self.config.to_dict()}
        content = json.loads(json.dumps(content))
        (folder / JSON).write_text(json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Returns the manifest of a folder. Raises ArtefactError if it is missing, damaged or of another version."""
        path = folder / JSON
        if not path.is_file():
            raise ArtefactError(f"load_exported: folder must hold {JSON}, got {folder} without it; export again")
        try:
            content = dict(json.loads(path.read_text()).items())
            digest = content.pop("sha256")
            version = content.pop("version")
        except (ValueError, KeyError, AttributeError, RecursionError) as error:
            raise ArtefactError(
                f"load_exported: {path} must be a manifest, got something else; export again"
            ) from error
        if version != VERSION:
            raise ArtefactError(
                f"load_exported: manifests must be of version {VERSION}, got {version!r} in {path}; export again"
            )
        if digest != _digest({"version": version, **content}):
            raise ArtefactError(f"load_exported: {path} must be unchanged, got an altered one; export again")
        try:
            for name in ("levels", "tokens", "grid", "operators"):
                content[name] = tuple(content[name])
            content["inputs"] = tuple(
                tuple(Input(each["name"], tuple(each["shape"]), each["dtype"]) for each in stage)
                for stage in content["inputs"]
            )
            content["config"] = JiTConfig.from_dict(content["config"])
            manifest = cls(**{field.name: content[field.name] for field in fields(cls)})
            manifest.check_types()
            manifest.check_values()
            named, expected = set(manifest.files), {WEIGHTS, TENSORS, *manifest.stage_files}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtefactError(
                f"load_exported: {path} must hold every field of a manifest, got {type(error).__name__}: {error}; "
                f"export again"
            ) from error
        if named != expected:
            raise ArtefactError(
                f"load_exported: files of {path} must be {', '.join(sorted(expected))}, got "
                f"{', '.join(sorted(map(str, named))) or 'none'}; export again"
            )
        return manifest

    def check_types(self) -> None:
        """Raises TypeError for a field of the wrong type."""
        texts = ("codebase", "dtype", "device", "processor", "torch_version", "attention")
        for name in (*texts, "batch", "text_tokens"):
            value, kind = getattr(self, name), str if name in texts else int
            if type(value) is not kind:
                raise TypeError(f"{name} must be {kind.__name__}, got {value!r}")
        if any(type(count) is not int for count in (*self.tokens, *self.grid)):
            raise TypeError(f"tokens and grid must be whole numbers, got {self.tokens} and {self.grid}")
        if any(type(level) is not float for level in self.levels):
            raise TypeError(f"levels must be numbers, got {self.levels}")
        if len(self.inputs) != len(self.tokens):
            raise TypeError(f"inputs must be of {len(self.tokens)} stages, got {len(self.inputs)}")
        if any(type(digest) is not str for digest in self.files.values()):
            raise TypeError(f"files must have digests of text, got {self.files}")

    def check_values(self) -> None:
        """Raises ValueError for a field with a value that no export writes."""
        for name, most in (("batch", MOST_BATCH), ("text_tokens", MOST_TEXT_TOKENS)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be in 1..{most}, got {getattr(self, name)}")
        if len(self.grid) not in (2, 3) or min(self.grid) < 1:
            raise ValueError(f"grid must have two or three sides above 0, got {self.grid}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if set(self.operators) - {"cpu", "cuda"}:
            raise ValueError(f"operators must be of cpu and cuda, got {self.operators}")
        if len(self.levels) != (self.config.steps if isinstance(self.config.steps, int) else len(self.levels) - 1) + 1:
            raise ValueError(f"levels must be one more than the {self.config.steps} steps, got {len(self.levels)}")

    def check_files(self, folder: Path) -> None:
        """Raises ArtefactError for the first file that is missing or was changed."""
        for name, expected in self.files.items():
            path = folder / name
            if not path.is_file():
                raise ArtefactError(f"load_exported: {folder} must hold {name}, got no such file; export again")
            if file_digest(path) != expected:
                raise ArtefactError(
                    f"load_exported: {path} must be as it was written (SHA-256 {expected[:12]}...), got another "
                    f"content; copy the folder again, or export again"
                )

    def check_machine(self, device: torch.device) -> None:
        """Raises ArtefactError if torch, device or processor differ from those that the stages were made for."""
        here = {"device": device.type, "torch_version": torch.__version__, "processor": processor(device)}
        for name, value in here.items():
            made_for = getattr(self, name)
            if made_for != value:
                raise ArtefactError(
                    f"load_exported: {name} must be {made_for}, which the stages were made for, got {value}; "
                    f"export on this machine"
                )

    def check_arguments(self, stage: int, arguments: Sequence[Tensor]) -> None:
        """Raises ArtefactError for the first argument whose shape, dtype or device differs from the exported one.

        Compiled stages check nothing themselves, and would read beyond the end of a tensor that is too small.
        """
        expected = self.inputs[stage]
        if len(arguments) != len(expected):
            names = ", ".join(each.name for each in expected)
            raise ArtefactError(f"Exported.run: arguments must be {names}, got {len(arguments)} of them; pass all")
        for each, given in zip(expected, arguments, strict=True):
            if not each.is_met_by(given, self.device):
                raise ArtefactError(
                    f"Exported.run: {each.name} must be torch.{each.dtype} {each.shape} on {self.device}, which stages "
                    f"were made for, got {given.dtype} {tuple(given.shape)} on {given.device}; export for it too"
                )

    def check_call(self, **values: Any) -> None:
        """Raises ArtefactError if a call's batch, grid, text_tokens, dtype or device differs from the manifest's."""
        for name, value in values.items():
            made_for = getattr(self, name)
            if made_for != value:
                raise ArtefactError(
                    f"jitaccel: {name} must be {_as_text(made_for)}, which the exported stages were made for, got "
                    f"{_as_text(value)}; export again for these, or use the former"
                )


def _as_text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def manifest_tensors(config: JiTConfig, levels: Sequence[float], grid: tuple[int, ...]) -> dict[str, Tensor]:
    """Returns what a program without JSON needs of a manifest, as tensors by name.

    levels: (S + 1,) float32
    stages: (S,) int64, the stage of each step
    tokens: (K,) int64
    grid: (2,) int64, height and width; or (3,), frames first, which the C++ example refuses
    window: (1,) int64, the importance window
    move_weight: (1,) float64
    own_noise: (1,) int64
    blur_k: (W_k,) float32, of stage k
    solver_gains: (S,) float64; a step adds this times the change of the clean estimate since the last step; 0 for Euler
    """
    steps, num_tokens = len(levels) - 1, num_tokens_of(grid)
    counts = config.stage_tokens(grid)
    whole = {
        "stages": [config.stage_of_step(step, steps) for step in range(steps)],
        "tokens": list(counts),
        "pooling": [config.pooling_of(stage) for stage in range(config.num_stages)],
        "grid": list(grid),
        "window": [config.importance_window],
        "own_noise": [int(config.noise == "own")],
    }
    return {
        "levels": torch.tensor(levels, dtype=torch.float32),
        "move_weight": torch.tensor([config.move_weight], dtype=torch.float64),
        "solver_gains": torch.tensor(_solver_gains(config, levels), dtype=torch.float64),
        **{name: torch.tensor(values, dtype=torch.int64) for name, values in whole.items()},
        **{
            f"blur_{stage}": blur_weights(count / num_tokens, config.blur_scale).float()
            for stage, count in enumerate(counts)
        },
    }


def _solver_gains(config: JiTConfig, levels: Sequence[float]) -> list[float]:
    weight = make_solver(config.solver).weight
    after = zip(levels, levels[1:], levels[2:], strict=False)
    return [0.0, *((1.0 - end / start) * weight(before, start, end) for before, start, end in after)]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file of tensors on any device."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    example = path.with_name(f".{path.name}.mode")  # safetensors' mode is for one user; apply the umask
    example.touch()
    path.chmod(example.stat().st_mode & 0o777)
    example.unlink()


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def processor(device: torch.device) -> str:
    """Returns what compiled code depends on: the instruction set of the CPU, or the GPU's compute capability."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
