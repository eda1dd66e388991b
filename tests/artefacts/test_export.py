"""Exported stages: the eager latents behind the same patch, and none that is used for what it was not made for."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import jitaccel
from jitaccel import ArtefactError, ConfigError, UnsupportedModelError, ops
from jitaccel.artefacts.export import weights_of
from jitaccel.artefacts.manifest import VERSION, Manifest, manifest_tensors, write_tensors
from tests.support import tiny
from tests.support.tiny import GRID, SHORT, TEXT_TOKENS, generate, relative_error

SIZE = (GRID[0] * tiny.PIXELS_PER_TOKEN, GRID[1] * tiny.PIXELS_PER_TOKEN)
TWO_STAGES = SHORT.replace(densities=(0.5, 1.0), boundaries=(0.5, 1.0), steps=2)
GUIDED: dict[str, Any] = {"negative_prompt": "green", "true_cfg_scale": 3.0}


def export(pipe: Any, folder: Path, preset: Any = SHORT, **settings: Any) -> Path:
    defaults: dict[str, Any] = {"size": SIZE, "format": "torchscript", "text_tokens": TEXT_TOKENS}
    return jitaccel.export(pipe, folder, preset, **{**defaults, **settings})


def eager(pipe: Any, config: Any = SHORT, **call: Any) -> torch.Tensor:
    with jitaccel.apply(pipe, config):
        return generate(pipe, **call)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages of the pipeline with seed 0, traced."""
    return export(tiny.pipeline(), tmp_path_factory.mktemp("artefacts") / "with space")


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@pytest.mark.parametrize("call", [{}, {"seed": 3}, GUIDED], ids=["plain", "other seed", "guided"])
def test_stages_make_the_eager_latents(pipe: Any, exported: Path, call: dict[str, Any]) -> None:
    expected = eager(pipe, **call)
    pipe.transformer = None  # not needed any more
    with jitaccel.load_exported(exported).apply(pipe) as handle:
        for _ in range(2):
            assert relative_error(generate(pipe, **call), expected) < 1e-5
        stats = handle.stats()
    assert (stats.execution, stats.attention, stats.token_steps) == ("exported", "sdpa, torchscript", 481)


@pytest.fixture(scope="module")
def aoti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages of the pipeline with seed 0, compiled."""
    if " " in torch.__file__:
        pytest.skip("torch's inductor does not quote its own path to the C++ compiler")
    options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    folder = tmp_path_factory.mktemp("artefacts") / "aoti"
    return export(tiny.pipeline(), folder, TWO_STAGES, format="aoti", options=options)


@pytest.mark.slow
def test_aoti_makes_the_eager_latents(pipe: Any, aoti: Path) -> None:
    expected = eager(pipe, TWO_STAGES)
    assert sorted(path.name for path in aoti.iterdir()) == [
        "manifest.json", "manifest.safetensors", "stage0.pt2", "stage1.pt2", "weights.safetensors",
    ]  # fmt: skip
    with jitaccel.load_exported(aoti).apply(pipe):
        assert relative_error(generate(pipe), expected) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"lifter": "clean", "micro_flow": "none"},
        {"noise": "own"},
        {"schedule": "native"},
        {"micro_flow": "released"},
        {"solver": "dpmpp_2m"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_are_exported(pipe: Any, tmp_path: Path, settings: Mapping[str, Any]) -> None:
    config = TWO_STAGES.replace(**settings)
    expected = eager(pipe, config)
    with jitaccel.load_exported(export(pipe, tmp_path / "x", config)).apply(pipe):
        assert relative_error(generate(pipe), expected) < 1e-5


def test_batch_of_images_with_anchors_of_their_own(pipe: Any, tmp_path: Path) -> None:
    call: dict[str, Any] = {"seed": (1, 2), "prompt": ["a", "red circle"]}
    expected = eager(pipe, TWO_STAGES, **call)
    with jitaccel.load_exported(export(pipe, tmp_path / "x", TWO_STAGES, batch_size=2)).apply(pipe):
        assert relative_error(generate(pipe, **call), expected) < 1e-5


@pytest.mark.parametrize("lifter", ["velocity", "clean"])
def test_half_precision_stays_within_its_own_error(pipe: Any, tmp_path: Path, lifter: Any) -> None:
    config = TWO_STAGES.replace(lifter=lifter)
    exact, half = eager(pipe, config), copy.deepcopy(pipe).to(torch.bfloat16)
    usual = eager(half, config)
    with jitaccel.load_exported(export(half, tmp_path / "x", config)).apply(half):
        made = generate(half)
    assert made.dtype == torch.bfloat16
    assert relative_error(made, exact) <= 2 * relative_error(usual, exact)


def test_lora_layers_are_exported_with_their_scale(pipe: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plain = eager(pipe, TWO_STAGES)
    lora = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "proj_mlp"])
    pipe.transformer.add_adapter(lora, adapter_name="one")
    pipe.transformer.set_adapters(["one"], [0.5])
    expected = eager(pipe, TWO_STAGES)
    assert relative_error(expected, plain) > 1e-3
    with jitaccel.load_exported(export(pipe, tmp_path / "x", TWO_STAGES)).apply(pipe):
        assert relative_error(generate(pipe), expected) < 1e-5


def test_weights_are_stored_once_and_read_from_their_file(exported: Path) -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        stage = torch.jit.load(str(exported / "stage0.pt"))
    assert not list(stage.parameters())
    loaded = jitaccel.load_exported(exported)
    model = tiny.pipeline().transformer
    expected = [weight for _, weight in sorted(model.named_parameters())]
    assert all(torch.equal(one, other) for one, other in zip(loaded._weights, expected, strict=True))


def test_removed_handle_leaves_the_pipeline_as_it_was(pipe: Any, exported: Path) -> None:
    expected = generate(pipe, num_inference_steps=3)
    before, state = pipe.transformer, dict(vars(pipe))
    handle = jitaccel.load_exported(exported).apply(pipe)
    with pytest.raises(RuntimeError, match="stop"):
        generate(pipe, callback_on_step_end=_stop)
    generate(pipe)
    handle.remove()
    assert pipe.transformer is before and vars(pipe).keys() == state.keys()
    assert torch.equal(generate(pipe, num_inference_steps=3), expected)


def _stop(*_: Any) -> dict[str, Any]:
    raise RuntimeError("stop")


def test_exported_and_patched_pipelines_do_not_mix(pipe: Any, exported: Path, tmp_path: Path) -> None:
    loaded = jitaccel.load_exported(exported)
    with jitaccel.apply(pipe, SHORT):
        with pytest.raises(ConfigError, match="must not be patched"):
            loaded.apply(pipe)
        with pytest.raises(ConfigError, match="must not be patched"):
            export(pipe, tmp_path / "x")
    with loaded.apply(pipe), pytest.raises(ConfigError, match="must not be patched"):
        loaded.apply(pipe)
    with pytest.raises(UnsupportedModelError, match="must be a FluxPipeline"):
        loaded.apply(pipe.transformer)


# What an artefact was not made for


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"grid": (12, 14)}, "grid must be 12x12, .* got 12x14"),
        ({"grid": (9, 16)}, "grid must be 12x12, .* got 9x16"),
        ({"seed": (1, 2), "prompt": ["a", "red"]}, "batch must be 1, .* got 2"),
        ({"max_sequence_length": 7}, "text_tokens must be 8, .* got 7"),
        ({"joint_attention_kwargs": {"scale": 0.5}}, "got joint_attention_kwargs too"),
    ],
)
def test_call_that_stages_were_not_made_for_is_refused(
    pipe: Any, exported: Path, call: dict[str, Any], words: str
) -> None:
    expected = eager(pipe)
    with jitaccel.load_exported(exported).apply(pipe):
        with pytest.raises((ArtefactError, UnsupportedModelError), match=words):
            generate(pipe, **call)
        assert relative_error(generate(pipe), expected) < 1e-5


def test_argument_of_a_stage_that_it_was_not_made_for_is_refused(exported: Path) -> None:
    """A compiled stage would read beyond the end of it."""
    loaded, manifest = jitaccel.load_exported(exported), Manifest.read(exported)
    blur = manifest_tensors(manifest.config, manifest.levels, manifest.grid)["blur_0"]
    anchors = torch.arange(manifest.tokens[0])[None]
    arguments = [
        tiny.start(), anchors, torch.zeros(1, 144, dtype=torch.int64), blur, torch.zeros(1, TEXT_TOKENS, tiny.WIDTH),
        torch.zeros(1, tiny.WIDTH), torch.ones(1), torch.tensor([0.9, 0.8]),
    ]  # fmt: skip
    velocity, state = loaded.run(0, *arguments)
    assert velocity.shape == state.shape == tiny.start().shape
    for place, name in enumerate(("state", "anchors", "nearest", "blur", "text", "pooled", "guidance", "levels")):
        for wrong in (arguments[place][..., :-1], arguments[place].to(torch.float16)):
            with pytest.raises(ArtefactError, match=rf"{name} must be torch\.\w+ .* got torch"):
                loaded.run(0, *arguments[:place], wrong, *arguments[place + 1 :])
    with pytest.raises(ArtefactError, match="got 7 of them"):
        loaded.run(0, *arguments[:-1])


def test_other_dtype_is_refused(pipe: Any, exported: Path) -> None:
    half = copy.deepcopy(pipe).to(torch.bfloat16)
    with (
        jitaccel.load_exported(exported).apply(half),
        pytest.raises(ArtefactError, match=r"dtype must be float32, .* got bfloat16"),
    ):
        generate(half)


@pytest.mark.parametrize(
    ("made_for", "words"),
    [
        ({"torch_version": "2.9.0"}, r"torch_version must be 2\.9\.0, .* got " + torch.__version__.replace("+", r"\+")),
        ({"processor": "sparc"}, "processor must be sparc, .* got "),
        ({"device": "meta"}, "device must be meta, .* got cpu"),
    ],
)
def test_other_machine_is_refused(folder: Path, made_for: dict[str, str], words: str) -> None:
    replace(Manifest.read(folder), **made_for).write(folder)
    with pytest.raises(ArtefactError, match=words):
        jitaccel.load_exported(folder, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_device_that_is_not_here_is_refused(exported: Path) -> None:
    with pytest.raises(ArtefactError, match="no CUDA device"):
        jitaccel.load_exported(exported, device="cuda")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def _alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _alter, Path.unlink], ids=["truncated", "altered", "missing"])
@pytest.mark.parametrize("name", ["stage1.pt", "weights.safetensors", "manifest.safetensors", "manifest.json"])
def test_damaged_folder_is_refused(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(folder / name)
    with pytest.raises(ArtefactError, match=name.replace(".", r"\.")):
        jitaccel.load_exported(folder)


def test_manifest_with_another_number_is_refused(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["levels"][1] = 0.5
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match="altered"):
        jitaccel.load_exported(folder)
    (folder / "manifest.json").write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(ArtefactError, match=f"of version {VERSION}, got 99"):
        jitaccel.load_exported(folder)


def _signed(folder: Path, content: Any) -> None:
    """Writes a manifest whose own checksum is right."""
    content = {name: value for name, value in content.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": digest}))


@pytest.mark.parametrize("name", ["stage1.pt", "weights.safetensors", "manifest.safetensors"])
def test_signed_manifest_that_names_fewer_files_is_refused(folder: Path, name: str) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    _signed(folder, content)
    jitaccel.load_exported(folder)
    del content["files"][name]
    _signed(folder, content)
    with pytest.raises(ArtefactError, match=r"files of .* must be .*stage0\.pt.*; export again"):
        jitaccel.load_exported(folder)


def test_signed_manifest_that_names_another_file_is_refused(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["files"]["../elsewhere"] = "0" * 64
    _signed(folder, content)
    with pytest.raises(ArtefactError, match="elsewhere"):
        jitaccel.load_exported(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("files", []), ("files", None), ("inputs", 3), ("tokens", None), ("config", []), ("config", {}),
        ("format", "onnx"), ("format", ["aoti"]), ("levels", 1), ("dtype", -1), ("text_tokens", None), ("batch", True),
        ("grid", ["a", "b"]), ("levels", [None, 0.0]), ("processor", {}), ("inputs", []),
    ],
)  # fmt: skip
def test_signed_manifest_with_a_field_of_another_kind_is_refused(folder: Path, name: str, value: Any) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    _signed(folder, {**content, name: value})
    with pytest.raises(ArtefactError, match=r"manifest\.json"):
        jitaccel.load_exported(folder)


@pytest.mark.parametrize(
    "text", ["[]", "[" * 100_000, '{"a":' * 100_000, "3", "null", '"text"', "", "\ud800"],
    ids=["list", "deep lists", "deep mappings", "number", "null", "text", "empty", "no UTF-8"],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ArtefactError, match="must be a manifest, got something else"):
        jitaccel.load_exported(folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((None,), "folder must be a path"), ((3,), "folder must be a path")],
)
def test_bad_folder_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        jitaccel.load_exported(*arguments)


@pytest.mark.parametrize("device", ["gpu", "cpu:x", 3.5, ["cpu"]])
def test_bad_device_is_refused(exported: Path, device: Any) -> None:
    with pytest.raises(ConfigError, match="device must be a device of torch"):
        jitaccel.load_exported(exported, device=device)


@pytest.mark.parametrize(("mask", "of_files", "of_folder"), [(0o077, 0o600, 0o700), (0o022, 0o644, 0o755)])
def test_modes_follow_the_umask(pipe: Any, tmp_path: Path, mask: int, of_files: int, of_folder: int) -> None:
    before = os.umask(mask)
    try:
        folder = export(pipe, tmp_path / "x", TWO_STAGES)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == of_folder
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert set(modes) == {"manifest.json", *Manifest.read(folder).files}
    assert set(modes.values()) == {of_files}, modes


def test_nothing_is_unpickled_by_python(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    jitaccel.load_exported(exported)


def test_manifest_reads_what_it_wrote(exported: Path) -> None:
    manifest = Manifest.read(exported)
    assert manifest.config == SHORT and manifest.tokens == SHORT.token_counts(144) and len(manifest.levels) == 6
    tensors = manifest_tensors(manifest.config, manifest.levels, manifest.grid)
    assert tensors["stages"].tolist() == [0, 0, 1, 2, 2] and tensors["tokens"].tolist() == [50, 93, 144]
    assert tensors["levels"][-1] == 0 and tensors["blur_0"].shape[0] % 2 == 1


# What cannot be exported


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": "onnx"}, "must be one of aoti, torchscript, got 'onnx'"),
        ({"size": (50, 48)}, "multiples of 4 pixels"),
        ({"batch_size": 0}, "batch_size must be a whole number in 1..1024, got 0"),
        ({"text_tokens": 1.5}, "text_tokens must be a whole number"),
        ({"steps": "caller"}, "steps must be a number"),
        ({"attention": "flash"}, "attention must be one of"),
        ({"attention": None}, "attention must be one of"),
        ({"format": ["aoti"]}, "format must be one of"),
        ({"size": 48}, r"size must be \(height, width\)"),
        ({"size": None}, r"size must be \(height, width\)"),
        ({"size": (48, "48")}, "multiples of 4 pixels"),
        ({"size": (48.0, 48)}, "multiples of 4 pixels"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"batch_size": None}, "batch_size must be a whole number"),
        ({"options": "max_autotune"}, "options must be a mapping"),
    ],
)
def test_bad_settings_are_refused_and_leave_nothing(
    pipe: Any, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        export(pipe, tmp_path / "x", **settings)
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_kept(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must not exist"):
        export(pipe, tmp_path)


def test_export_that_fails_leaves_no_folder(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jitaccel.artefacts.export._lower", _stop)
    with pytest.raises(RuntimeError, match="stop"):
        export(pipe, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_bare_transformers_and_quantised_weights_are_refused(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"must be a FluxPipeline, .*got FluxTransformer2DModel"):
        export(pipe.transformer, tmp_path / "x")
    linear = torch.nn.Linear(2, 2)
    linear.weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"plain floating tensors, got Tensor of torch\.int8 for weight"):
        weights_of(linear)


# The C++ example


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`examples/cpp`, built as its README says, in a folder with a space in its name."""
    if shutil.which("g++") is None or shutil.which("make") is None:
        pytest.skip("no C++ compiler")
    if "cpu" not in ops.compiled():
        pytest.skip("the CPU operators are not built")
    source = Path(__file__).parents[2] / "examples" / "cpp"
    folder = tmp_path_factory.mktemp("an example") / "cpp"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("generate"))
    done = subprocess.run(
        ["make", f"PYTHON={sys.executable}", "CXXFLAGS=-O0"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    return folder / "generate"


def _run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(argument) for argument in (program, *arguments, ops.compiled()["cpu"])]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _inputs(pipe: Any, path: Path, seeds: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Writes what the program needs, and returns what the pipeline is called with."""
    text, pooled, _ = pipe.encode_prompt(
        "a red circle", None, num_images_per_prompt=len(seeds), max_sequence_length=TEXT_TOKENS
    )
    state = torch.cat([tiny.start(seed) for seed in seeds])
    write_tensors(path, {"state": state, "text": text, "pooled": pooled, "guidance": torch.full((len(seeds),), 3.5)})
    return {"latents": state}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchscript", "aoti"])
def test_cpp_program_makes_the_same_latents(
    pipe: Any, program: Path, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, config = {"torchscript": ("exported", SHORT), "aoti": ("aoti", TWO_STAGES)}[kind]
    call = _inputs(pipe, tmp_path / "in.safetensors", (5,))
    done = _run(program, request.getfixturevalue(folder), tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr
    made = load_file(tmp_path / "out.safetensors")["state"]
    assert relative_error(made, eager(pipe, config, guidance_scale=3.5, **call)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"densities": (0.2, 0.7, 1.0), "noise": "own"},
        {"densities": (0.6, 0.8, 1.0)},
        {"lifter": "clean", "micro_flow": "none"},
        {"solver": "dpmpp_2m"},
        {"densities": (0.25, 0.7, 1.0), "pooling": (2, 1, 1), "solver": "dpmpp_2m", "lifter": "clean"},
    ],
    ids=["own noise", "fresh noise", "clean, none", "multistep", "pooled"],
)
def test_cpp_program_makes_a_batch_with_few_and_many_anchors(
    pipe: Any, program: Path, settings: Mapping[str, Any], tmp_path: Path
) -> None:
    """Fewer anchors than the regular ones, and more: both are drawn at random, and then the noise."""
    config = SHORT.replace(**settings)
    folder = export(pipe, tmp_path / "x", config, batch_size=2)
    call = _inputs(pipe, tmp_path / "in.safetensors", (5, 6))
    done = _run(program, folder, tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr
    expected = eager(pipe, config, num_images_per_prompt=2, guidance_scale=3.5, **call)
    assert relative_error(load_file(tmp_path / "out.safetensors")["state"], expected) < 1e-5


@pytest.mark.slow
def test_cpp_program_says_what_is_wrong_in_one_line(pipe: Any, program: Path, folder: Path, tmp_path: Path) -> None:
    inputs, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    _inputs(pipe, inputs, (5,))
    whole = inputs.read_bytes()
    for content, words in (
        (whole[:-4], "must lie within the file"),
        (whole[:20], "fewer than its header tells"),
        (b"", "got 0 bytes"),
        (len(b"[1]").to_bytes(8, "little") + b"[1]", "expected {"),
        (whole.replace(b'"pooled"', b'"poolex"'), "must hold a tensor pooled, got none"),
        (whole.replace(b'"F32"', b'"F12"'), "got F12"),
    ):
        inputs.write_bytes(content)
        done = _run(program, folder, inputs, out)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    inputs.write_bytes(whole)
    (folder / "stage1.pt").unlink()
    done = _run(program, folder, inputs, out)
    assert done.returncode == 2 and "must hold stage1.pt2 or .pt, got neither" in done.stderr
    assert _run(program, folder).returncode == 2 and not out.exists()


def test_manifest_declares_what_each_stage_is_called_with(folder: Path) -> None:
    """By name, shape and dtype, as the codebase gave it: nothing here knows what a network asks."""
    manifest = Manifest.read(folder)
    for inputs, count in zip(manifest.inputs, manifest.tokens, strict=True):
        declared = {each.name: (each.shape, each.dtype) for each in inputs}
        assert next(iter(declared)) == "state"
        assert declared["state"] == (
            (manifest.batch, manifest.grid[0] * manifest.grid[1], manifest.channels),
            manifest.dtype,
        )
        assert declared["anchors"] == ((manifest.batch, count), "int64")
        assert declared["levels"] == ((2,), "float32")
