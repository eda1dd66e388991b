"""The `jitaccel` command: pictures, the demonstration, the doctor, and errors on bad input."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jitaccel import ops
from jitaccel.cli import doctor, main
from jitaccel.cli.demo import table
from jitaccel.evaluation.pictures import grid_picture, show_active
from jitaccel.evaluation.quality.metrics import psnr_db

Outcome = tuple[int, str, str]
Command = Callable[..., Outcome]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline in a folder with a space in its name."""
    pytest.importorskip("diffusers")
    from tests.support import tiny

    folder = tmp_path_factory.mktemp("a model")
    tiny.pipeline().save_pretrained(folder)
    return folder


def is_one_line(text: str) -> bool:
    return len(text.strip().splitlines()) == 1 and "Traceback" not in text


def test_command_without_arguments_explains_itself(command: Command) -> None:
    status, out, _ = command()
    assert status == 2
    assert all(name in out for name in ("generate", "demo", "doctor"))


def test_command_says_its_version(command: Command) -> None:
    status, out, _ = command("--version")
    assert (status, out.split()[0]) == (0, "jitaccel")


def test_importing_the_command_imports_no_torch() -> None:
    program = "import sys, jitaccel.cli; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_generate_writes_the_same_picture_for_the_same_seed(command: Command, model: Path, tmp_path: Path) -> None:
    pictures = []
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        out = tmp_path / "new folder" / name
        status, text, err = command(
            "generate", "--model", model, "--prompt", "a red circle", "--seed", seed, "--out", out,
            "--max-sequence-length", 8,
        )  # fmt: skip
        assert (status, str(out) in text) == (0, True), err
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_generate_says_which_words_the_embedded_model_does_not_know(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    from jitaccel import loading
    from tests.support import tiny

    monkeypatch.setattr(loading, "load_pipeline", lambda *_, **__: tiny.pipeline())
    monkeypatch.setattr(loading, "picture_sizes", lambda _: None)
    monkeypatch.setattr(loading, "pipeline_class", lambda _: None)
    call = ("generate", "--preset", "none", "--steps", 2, "--size", 32, "--max-sequence-length", 8, "--out")

    def notes(name: str, *more: object) -> list[str]:
        status, _, err = command(*call, tmp_path / name, *more)
        assert status == 0 and (tmp_path / name).is_file(), err
        return [line for line in err.splitlines() if line.startswith("jitaccel")]  # the rest is of tiny text encoders

    (note,) = notes("a.png", "--prompt", "a striped cat by the sea, a striped boat")
    assert note.startswith("jitaccel generate: the embedded model draws landscapes, it does not know 'striped', 'cat',")
    assert "'by'; its words are in" in note
    assert notes("b.png", "--prompt", "Green mountains at noon with a lake.") == []
    assert notes("c.png", "--prompt", "a cat", "--model", "some/model", "--dtype", "float32") == []


def test_generate_takes_every_option_and_prints_statistics(command: Command, model: Path, tmp_path: Path) -> None:
    status, out, err = command(
        "generate", "--model", model, "--prompt", "a red circle", "--preset", "7x", "--steps", 5, "--size",
        "64x48", "--true-cfg", 2, "--negative-prompt", "blue", "--guidance", 2, "--dtype", "float32", "--device",
        "cpu", "--max-sequence-length", 8, "--stats", "--out", tmp_path / "a.jpg",
    )  # fmt: skip
    assert status == 0, err
    assert "48x64" in out and "grid 16x12" in out
    assert len([line for line in out.splitlines() if line.strip()[:1].isdigit()]) == 5


def test_generate_runs_the_pipeline_untouched_where_asked(command: Command, model: Path, tmp_path: Path) -> None:
    status, out, err = command(
        "generate", "--model", model, "--prompt", "a", "--preset", "none", "--steps", 2, "--max-sequence-length", 8,
        "--stats", "--out", tmp_path / "a.png",
    )  # fmt: skip
    assert status == 0, err
    assert "untouched" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--preset", "7xx"), "--preset must be 4x, 7x, 10x, few-steps, 4x-paper, 7x-paper, dense, auto or none, got"),
        (("--preset", "7xx"), 'did you mean "7x"'),
        (("--preset", "autp"), 'did you mean "auto"'),
        (("--preset", "non"), 'did you mean "none"'),
        (("--size", "tall"), "--size must be HxW in pixels, got 'tall'; for example 1024x1024"),
        (("--offload", "model", "--device", "cpu", "--size", "64"), "--offload must be none on the CPU, got model"),
        (("--steps", "0"), "--steps must be in 1..10000, got 0"),
        (("--preset", "7x-paper", "--steps", "3"), "use 4 steps"),
        (("--out", "picture.txt"), "--out must end in"),
        (("--true-cfg", "1"), "--true-cfg must be above 1"),
        (("--negative-prompt", "blue"), "--negative-prompt must come with --true-cfg"),
        (("--max-sequence-length", "513"), "--max-sequence-length must be in 1..512, got 513"),
        (("--seed", "-1"), "--seed must be in 0..2**63 - 1, got -1"),
        (("--model", "/no/such/folder"), "existing folder or a hub id"),
        (("--model", "."), "without model_index.json"),
        (("--device", "abacus"), "--device must be a device of this machine, got 'abacus'"),
    ],
)
def test_generate_refuses_bad_input_in_one_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--device" in arguments:
        (tmp_path / "model_index.json").write_text("{}")
        arguments = (*arguments, "--model", ".")
    status, out, err = command("generate", "--prompt", "a", "--out", "a.png", *arguments)
    assert (status, out) == (2, "")
    assert says in err and is_one_line(err)


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ("30x48", "a multiple of 4 pixels on both sides, got 30x48; the nearest for this model is 32x48"),
        ("0x48", "a multiple of 4 pixels on both sides, above 0, got 0x48; the nearest for this model is 4x48"),
        ("-8", "a multiple of 4 pixels on both sides, above 0, got -8x-8; the nearest for this model is 8x8"),
        ("4x4", "at least 8x8 for this preset, got 4x4; the nearest for this model is 8x8"),
        ("90000x90000", "at most 1024x1024 pixels in all, got 90000x90000; the nearest for this model is 1024x1024"),
        ("4096x1024", "at most 1024x1024 pixels in all, got 4096x1024; the nearest for this model is 2048x512"),
    ],
)
def test_generate_refuses_sizes_that_the_model_does_not_make_before_it_loads_weights(
    command: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, says: str
) -> None:
    from jitaccel import loading

    monkeypatch.setattr(loading, "load_pipeline", None)
    out = tmp_path / "a.png"
    status, _, err = command("generate", "--model", model, "--prompt", "a", "--out", out, f"--size={size}")
    assert (status, err) == (2, f"jitaccel generate: --size must be {says}\n")


def test_generate_keeps_an_existing_picture_unless_told(command: Command, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    out.write_text("mine")
    arguments = ("generate", "--model", model, "--prompt=a", "--steps=4", "--max-sequence-length", 8, "--out", out)
    status, _, err = command(*arguments)
    assert status == 2 and "--overwrite" in err and out.read_text() == "mine"
    assert command(*arguments, "--overwrite")[0] == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_missing_diffusers_is_named_with_the_remedy(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "diffusers" else found(name))
    for arguments in (("generate", "--prompt", "a", "--out", tmp_path / "a.png"), ("demo", "--out", tmp_path)):
        status, _, err = command(*arguments)
        assert status == 2
        assert 'pip install "jitaccel[diffusers]"' in err and is_one_line(err)


def test_doctor_says_what_is_there_and_why_the_rest_is_not_usable(command: Command) -> None:
    status, out, _ = command("doctor")
    assert status == 0
    assert "nearest_anchor, lift" in out
    lines = {line.strip()[:13].strip(): line for line in out.splitlines()}
    assert lines["sdpa"].endswith("usable")
    assert all(name in lines for name in ("flash_attn_3", "flash_attn", "torch_varlen", "xformers"))
    assert lines["on cpu"].endswith("nearest_anchor runs")
    if importlib.util.find_spec("flash_attn") is None:
        assert "flash-attn is not installed" in lines["flash_attn"]


@pytest.mark.parametrize(
    ("result", "line"), [(RuntimeError("no kernel image\nmore"), "fails: no kernel image"), ([[0]], "is wrong: [[0]]")]
)
def test_doctor_tells_a_device_on_which_an_operator_does_not_run(
    result: Any, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nearest_anchor(*arguments: Any) -> Any:
        if isinstance(result, Exception):
            raise result
        return torch.tensor(result)

    monkeypatch.setattr(ops, "nearest_anchor", nearest_anchor)
    assert doctor.trial("cpu") == f"nearest_anchor {line}"


def test_demo_prints_the_table_and_writes_both_pictures(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    from jitaccel import loading
    from jitaccel.evaluation import judging
    from tests.support import tiny

    monkeypatch.setattr(loading, "load_pipeline", lambda *_, **__: tiny.pipeline())
    monkeypatch.setattr(judging, "load_judge", lambda: None)
    status, out, err = command("demo", "--prompts", 2, "--out", tmp_path / "new", "--device", "cpu")
    assert status == 0, err
    first, *rest = out.splitlines()
    assert "torch" in first and " at " in first
    rows = {line.split()[0]: line for line in rest if line.split()}
    assert all(name in rows for name in ("dense", "control", "4x", "7x", "7x-paper"))
    assert rows["dense"].split()[1:3] == ["50", "3200"]
    assert "1.00x (1.00x)" in rows["dense"] and "1.00x (1.00x)" in rows["control"]
    for name in ("demo.png", "tokens.png"):
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")


def test_demo_refuses_a_file_for_a_folder(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert command("demo", "--out", file)[0] == 2
    assert command("demo", "--prompts", 0)[0] == 2


def test_table_shows_both_denominators() -> None:
    from jitaccel.cli.demo import _Result
    from jitaccel.evaluation.comparison import Method, TimedCall

    def result(name: str, steps: int, seconds: float, flops: int, level: float) -> _Result:
        pictures: Any = np.full((2, 8, 8, 3), level)
        made = TimedCall(
            pictures=pictures, denoise_s=seconds, whole_s=seconds + 1, flops=flops, token_steps=9, stats=None
        )
        return _Result(method=Method(name=name, steps=steps), generations=[made])

    results = [result("dense", 50, 20.0, 100, 0.5), result("control", 7, 4.0, 14, 0.6), result("7x", 11, 2.0, 10, 0.4)]
    lines = table(results, None)
    assert "10.00x (10.00x)" in lines[4] and "2.00x (1.40x)" in lines[4] and "20.00" in lines[4]
    assert "5.00" in lines[4].split()


def test_inactive_tokens_are_dimmed_and_active_ones_are_not() -> None:
    shown = show_active(np.zeros((8, 8, 3), np.uint8), [0, 3], (2, 2))
    assert (shown[:4, :4] == 0).all() and (shown[4:, 4:] == 0).all()
    assert (shown[:4, 4:] > 150).all()


def test_sheet_has_a_row_for_each_prompt_and_a_column_for_each_method() -> None:
    picture = np.ones((16, 16, 3), np.float32)
    one = grid_picture([[picture] * 2], ["a", "b"], ["a prompt much longer than the sheet is wide"])
    three = grid_picture([[picture] * 4] * 3, ["a"] * 4, ["p"] * 3)
    assert three.width == 2 * one.width - 8 and three.height > 2 * one.height - 30


def test_psnr_of_equal_pictures_is_infinite() -> None:
    picture = np.full((4, 4, 3), 0.5)
    assert psnr_db(picture, picture) == float("inf")
    assert psnr_db(picture, picture + 0.1) == pytest.approx(20.0)


# Export


def test_export_writes_stages_that_run_without_the_transformer(command: Command, model: Path, tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    import jitaccel
    from tests.support.tiny import generate

    folder = tmp_path / "stages of it"
    status, out, err = command(
        "export", "--model", model, "--size", "48x40", "--format", "torchscript", "--out", folder,
        "--max-sequence-length", 8, "--device", "cpu",
    )  # fmt: skip
    assert status == 0 and out.startswith(f"{folder}: manifest.json, manifest.safetensors, stage0.pt, ")
    assert "writing stages: 100%" in err
    call = {"grid": (12, 10), "seed": 1}
    pipe = FluxPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    with jitaccel.apply(pipe, "7x"):
        expected = generate(pipe, **call)
    pipe = FluxPipeline.from_pretrained(model, transformer=None)
    pipe.set_progress_bar_config(disable=True)
    with jitaccel.load_exported(folder).apply(pipe):
        torch.testing.assert_close(generate(pipe, **call), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--size", "10x24x3"), "--size must be HxW in pixels, got '10x24x3'"),
        (("--size", "50x48"), "the nearest for this model is 52x48"),
        (("--preset", "9x"), "preset"),
        (("--batch-size", 0), "--batch-size must be in 1..1024, got 0"),
        (("--max-sequence-length", 513), "--max-sequence-length must be in 1..512, got 513"),
    ],
)
def test_export_refuses_bad_input_in_one_line(
    command: Command, model: Path, tmp_path: Path, arguments: tuple[Any, ...], words: str
) -> None:
    settings = dict(zip(arguments[::2], arguments[1::2], strict=True))
    rest = [x for pair in {"--size": "48x48", **settings}.items() for x in pair]
    status, _, err = command("export", "--model", model, "--out", tmp_path / "x", "--device", "cpu", *rest)
    said = err.splitlines()[-1]  # the loader's bars come before
    assert status == 2 and words in said and said.startswith("jitaccel export: ") and "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_export_keeps_a_folder_that_exists(command: Command, tmp_path: Path) -> None:
    status, _, err = command("export", "--out", tmp_path)
    assert status == 2 and "--out must not exist" in err


def test_two_dashes_are_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt=a", "--out=--"]) == 2
    assert capsys.readouterr().err == "jitaccel generate: --out must have a value, got '--'; give another\n"


def test_half_a_character_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "a", "--out", "\ud800.png"]) == 2
    assert "an argument must be text" in capsys.readouterr().err
