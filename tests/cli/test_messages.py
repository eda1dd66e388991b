"""Error messages for people who type commands, and lists that need no loading."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import listing
from benchmarks.registry import find_cases
from jitaccel import PRESETS, loading
from jitaccel.cli import main, messages
from jitaccel.errors import CommandError
from jitaccel.patches.flux.flops import flux_dev_flops
from jitaccel.speed.overview import overview

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = {"preset": "7x", "target_ms": None, "target_speedup": 8.0, "max_sequence_length": 5, "size": None}


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (
            "auto_config: one of target_speedup and target_ms must be given, got none; say target_speedup=8.0",
            "one of --target-speedup and --target-ms must be given, got none; say --target-speedup 8.0",
        ),
        ("Auto.check: text_tokens must be above 0", "--max-sequence-length must be above 0"),
        ('apply: noise_levels must fall; use preset="dense"', "noise_levels must fall; use --preset dense"),
        ("export: size must be of 16\nexport: preset must be one", "--size must be of 16\n--preset must be one"),
        ("strength is low; use jitaccel.apply(..., preset='x'), or more", "strength is low; use preset='x', or more"),
        ("no function, and size and preset in a sentence", "no function, and size and preset in a sentence"),
    ],
)
def test_library_errors_name_options(reason: str, said: str) -> None:
    assert messages.as_options(reason, ARGUMENTS) == said


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: tried"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 must have the same dtype"), False),
    ],
)
def test_running_out_of_memory_is_one_line_with_remedies(
    error: Exception,
    is_memory: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(loading, "load_pipeline", fail)
    call = ["generate", "--prompt", "a", "--out", str(tmp_path / "a.png"), "--device", "cpu"]
    if not is_memory:
        with pytest.raises(RuntimeError, match="same dtype"):
            main(call)
        return
    assert main(call) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "jitaccel generate: out of memory; try --offload model, then --offload sequential, --dtype bfloat16, "
        "a smaller --size ("
    )


def test_remedies_leave_out_what_is_on_already() -> None:
    said = messages.out_of_memory(MemoryError(), {"offload": "sequential", "dtype": "bfloat16", "size": None})
    assert said == "out of memory; try a smaller --size (no details)"


def _gated() -> Exception:
    import httpx2
    from huggingface_hub.errors import GatedRepoError

    return GatedRepoError("403", response=httpx2.Response(403, request=httpx2.Request("GET", "https://huggingface.co")))


def _offline() -> Exception:
    from huggingface_hub.errors import LocalEntryNotFoundError

    return LocalEntryNotFoundError("cannot find the file in the local cache")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_gated, ("is gated", "accept its licence at https://huggingface.co/some/model", "`hf auth login`")),
        (_offline, ("HF_HUB_OFFLINE", "connect once, or give a folder")),
    ],
)
def test_model_out_of_reach_is_one_line_before_weights_load(
    make: Any,
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    pytest.importorskip("httpx2")
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> None:
        raise make()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(loading, "load_pipeline", None)
    call = ["generate", "--model", "some/model", "--prompt", "a", "--out", str(tmp_path / "a.png")]
    assert main(call) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jitaccel generate: --model must be") and all(part in line for part in words)


@pytest.mark.parametrize(("option", "value"), [("--device", "cuda:99"), ("--offload", "model")])
def test_device_is_checked_before_the_hub_is_asked(
    option: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(loading, "_from_hub", pytest.fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["generate", "--model", "a/b", "--prompt", "x", "--out", str(tmp_path / "a.png"), option, value]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"{option} must be" in error and "jitaccel doctor" in error
    assert len(error.splitlines()) == 1


def test_warnings_of_the_library_are_one_line_and_others_stay() -> None:
    before = warnings.formatwarning
    own, other = str(ROOT / "jitaccel" / "api.py"), "/elsewhere/other.py"
    with messages.warnings_in_one_line("generate"):
        line = warnings.formatwarning("jitaccel: something is slow", RuntimeWarning, own, 3)
        others = warnings.formatwarning("something is slow", UserWarning, other, 3)
    assert line == "jitaccel generate: something is slow\n"
    assert others == before("something is slow", UserWarning, other, 3)
    assert warnings.formatwarning is before


def test_loading_says_the_same_of_a_gated_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("httpx2")
    import diffusers

    def fail(*_: Any, **__: Any) -> None:
        raise _gated()

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", fail)
    with pytest.raises(CommandError, match="accept its licence"):
        loading.load_pipeline("some/model", device="cpu")


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offload_takes_the_place_of_moving_to_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    called = []

    class Pipe:
        def __getattr__(self, name: str) -> Any:
            return lambda **settings: called.append((name, settings))

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_, **__: Pipe())
    monkeypatch.setattr(loading, "pick_device", lambda _: torch.device("cuda:1"))
    loading.load_pipeline(None, device="cuda:1", offload=kind)
    name = {"model": "enable_model_cpu_offload", "sequential": "enable_sequential_cpu_offload"}[kind]
    assert called == [(name, {"device": torch.device("cuda:1")})]


def test_presets_are_listed_from_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    rows = {row.name: row for row in overview((64, 64), flux_dev_flops)}
    assert rows.keys() == PRESETS.keys() <= lines.keys()
    for name, row in rows.items():
        assert lines[name].split()[1] == str(PRESETS[name].steps) and f"{row.cost:.1f}" in lines[name]
    assert rows["7x"].shown == "6 at half the size, then 5 on all tokens"
    assert rows["7x-paper"].shown.startswith("4 on 32% of the tokens, then 3 on 60%")
    assert rows["dense"].cost == 50.0


def test_presets_cost_depends_on_the_size(capsys: pytest.CaptureFixture[str]) -> None:
    costs = []
    for size in ("512x512", "2048x2048"):
        assert main(["presets", "--size", size]) == 0
        costs.append([line.split() for line in capsys.readouterr().out.splitlines()])
    assert costs[0] != costs[1]
    assert main(["presets", "--size", "100x100"]) == 2
    assert "the nearest for this model is 96x96" in capsys.readouterr().err


def test_listing_names_every_case() -> None:
    pytest.importorskip("diffusers")
    found = {(case.group, case.size, case.name) for case in find_cases()}
    assert found == {*listing.CASES, *listing.OF_CHECKOUT}, "benchmarks/listing.py must name every case"


@pytest.mark.parametrize("command", [["bench", "--list"], ["presets"]])
def test_lists_import_no_torch(command: list[str]) -> None:
    program = f"import sys; from jitaccel.cli import main; main({command!r}); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout
