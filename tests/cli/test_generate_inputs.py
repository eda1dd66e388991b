"""`jitaccel generate` with pictures, masks and other arguments of a pipeline's call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import jitaccel

diffusers = pytest.importorskip("diffusers")

Command = Callable[..., tuple[int, str, str]]
HEIGHT, WIDTH = 28, 36  # less than the area that the tiny autoencoder was made for
SHORT = ("--prompt", "a red circle", "--max-sequence-length", 8, "--device", "cpu")


def saved(pipe: Any, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def flux(folder: Path) -> Path:
    from tests.support import tiny

    return saved(tiny.pipeline(), folder / "flux")


@pytest.fixture(scope="module")
def of_flux(folder: Path) -> Callable[[str], Path]:
    """Saves another pipeline of FLUX.1, by the name of its class."""
    from tests.support.pipelines import flux_pipeline

    return lambda name: saved(flux_pipeline(name), folder / name)


@pytest.fixture(scope="module")
def wan(folder: Path) -> Path:
    """A model whose index names WanImageToVideoPipeline."""
    from tests.support.every_model import wan_transformer
    from tests.support.video import text_pipeline

    pipe = text_pipeline(wan_transformer(in_channels=36, out_channels=16))
    parts = {**pipe.components, "image_encoder": None, "image_processor": None}
    return saved(diffusers.WanImageToVideoPipeline(**parts), folder / "wan")


@pytest.fixture
def _ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for a package that diffusers takes for installed."""
    from diffusers.pipelines.wan import pipeline_wan_i2v

    monkeypatch.setattr(pipeline_wan_i2v, "ftfy", SimpleNamespace(fix_text=str), raising=False)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture that lies on its side, as its EXIF says, with an alpha channel."""
    pixels = np.random.default_rng(0).integers(0, 256, (WIDTH, HEIGHT, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show it
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path, exif=exif)
    return path


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[8:20, 12:28] = 255
    path = tmp_path / "mask.png"
    Image.fromarray(pixels).save(path)
    return path


def pixels_of(path: Path) -> Any:
    return np.asarray(Image.open(path))


def made_in_python(kind: str, model: Path, preset: str = "7x", **call: Any) -> Any:
    """Returns what a user of diffusers gets of a class of pipelines, accelerated."""
    import torch

    pipe = getattr(diffusers, kind).from_pretrained(model, use_safetensors=True, **call.pop("parts", {}))
    pipe.set_progress_bar_config(disable=True)
    with jitaccel.apply(pipe, preset) as handle:
        steps = {} if handle.config.steps == "caller" else {"num_inference_steps": handle.config.steps}
        call = {"prompt": "a red circle", "max_sequence_length": 8, "height": HEIGHT, "width": WIDTH, **steps, **call}
        return np.asarray(pipe(generator=torch.Generator().manual_seed(0), **call).images[0])


def loaded(path: Path) -> Any:
    return diffusers.utils.load_image(str(path))


def test_image_starts_the_picture_and_gives_it_its_size(
    command: Command, flux: Path, photo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.png"
    call = ("generate", "--model", flux, *SHORT, "--image", photo, "--strength", 0.6, "--out", out, "--stats")
    status, said, error = command(*call)
    assert status == 0, error
    assert "diffusers FluxImg2ImgPipeline" in said and f"{WIDTH}x{HEIGHT}" in said
    expected = made_in_python("FluxImg2ImgPipeline", flux, image=loaded(photo), strength=0.6)
    assert (pixels_of(out) == expected).all()
    other = made_in_python("FluxImg2ImgPipeline", flux, image=loaded(photo), strength=0.9)
    assert (pixels_of(out) != other).any()


def test_mask_keeps_what_is_black(command: Command, flux: Path, photo: Path, mask: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    given = ("--image", photo, "--mask", mask, "--strength", 0.9)
    status, said, error = command("generate", "--model", flux, *SHORT, *given, "--out", out, "--stats")
    assert status == 0, error
    assert "diffusers FluxInpaintPipeline" in said
    call = {"image": loaded(photo), "mask_image": loaded(mask), "strength": 0.9}
    assert (pixels_of(out) == made_in_python("FluxInpaintPipeline", flux, **call)).all()


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("FluxFillPipeline", {"image": "--image", "mask_image": "--mask"}),
        ("FluxControlPipeline", {"control_image": "--control-image"}),
    ],
)
def test_pipeline_of_the_model_gets_what_its_call_takes(
    command: Command,
    of_flux: Callable[[str], Path],
    kind: str,
    given: dict[str, str],
    photo: Path,
    mask: Path,
    tmp_path: Path,
) -> None:
    model, out = of_flux(kind), tmp_path / "a.png"
    files = {"image": photo, "mask_image": mask, "control_image": photo}
    options = [word for name, option in given.items() for word in (option, files[name])]
    status, said, error = command("generate", "--model", model, *SHORT, *options, "--out", out, "--stats")
    assert status == 0, error
    assert f"diffusers {kind}" in said
    expected = made_in_python(kind, model, **{name: loaded(files[name]) for name in given})
    assert (pixels_of(out) == expected).all()


def test_options_are_arguments_of_the_call(
    command: Command, of_flux: Callable[[str], Path], photo: Path, tmp_path: Path
) -> None:
    model, out = of_flux("FluxKontextPipeline"), tmp_path / "a.png"
    given = ("--image", photo, "--option", f"max_area={HEIGHT * WIDTH}", "--option", "_auto_resize=false")
    status, _, error = command("generate", "--model", model, *SHORT, *given, "--out", out)
    assert status == 0, error
    call = {"image": loaded(photo), "max_area": HEIGHT * WIDTH, "_auto_resize": False}
    assert (pixels_of(out) == made_in_python("FluxKontextPipeline", model, **call)).all()


def test_controlnet_is_added(
    command: Command, flux: Path, of_flux: Callable[[str], Path], photo: Path, tmp_path: Path
) -> None:
    controlnet, out = of_flux("FluxControlNetPipeline") / "controlnet", tmp_path / "a.png"
    given = ("--controlnet", controlnet, "--control-image", photo, "--option", "controlnet_conditioning_scale=0.5")
    status, said, error = command("generate", "--model", flux, *SHORT, *given, "--out", out, "--stats")
    assert status == 0, error
    assert "diffusers FluxControlNetPipeline" in said
    parts = {"controlnet": diffusers.AutoModel.from_pretrained(str(controlnet))}
    call = {"control_image": loaded(photo), "controlnet_conditioning_scale": 0.5, "parts": parts}
    assert (pixels_of(out) == made_in_python("FluxControlNetPipeline", flux, **call)).all()


def test_controlnet_that_does_not_load_is_one_line(command: Command, flux: Path, photo: Path, tmp_path: Path) -> None:
    call = ("generate", "--model", flux, *SHORT, "--control-image", photo, "--out", tmp_path / "a.png")
    for controlnet in (tmp_path / "none", tmp_path):
        status, _, error = command(*call, "--controlnet", controlnet)
        assert status == 2
        assert f"--controlnet must be a diffusers ControlNet that loads, got {controlnet}" in last_line(error)


def test_another_class_is_loaded_where_named(command: Command, flux: Path, photo: Path, tmp_path: Path) -> None:
    call = ("generate", "--model", flux, *SHORT, "--pipeline", "FluxKontextPipeline", "--image", photo)
    area = ("--option", f"max_area={HEIGHT * WIDTH}", "--option", "_auto_resize=false")
    status, said, error = command(*call, *area, "--out", tmp_path / "a.png", "--stats")
    assert status == 0, error
    assert "diffusers FluxKontextPipeline" in said


@pytest.mark.usefixtures("_ftfy")
def test_image_becomes_a_video_of_its_shape(command: Command, wan: Path, tmp_path: Path) -> None:
    image, out = tmp_path / "wide.png", tmp_path / "a.gif"
    Image.new("RGB", (64, 32), "red").save(image)
    given = ("--image", image, "--option", f"last_image=@{image}", "--negative-prompt", "blue", "--frames", 5)
    call = ("generate", "--model", wan, *SHORT, *given, "--steps", 4, "--preset", "dense", "--out", out, "--stats")
    status, said, error = command(*call)
    assert status == 0, error
    assert "64x32, 5 frames" in said and "diffusers WanImageToVideoPipeline" in said


def test_sizes_have_the_shape_of_a_picture_and_no_more_than_the_area() -> None:
    from jitaccel.cli.options import size_like

    assert size_like((768, 1344), 1024**2, 16) == (768, 1344)
    assert size_like((3024, 4032), 1024**2, 16) == (880, 1184)
    assert size_like((100, 50), 1024**2, 16) == (96, 48)
    assert size_like((5000, 1), 1024**2, 16) == (4992, 16)
    assert size_like((1080, 1920), 480 * 832, 16) == (480, 848)


def last_line(error: str) -> str:
    line = error.strip().splitlines()[-1]
    assert line.startswith("jitaccel generate: ") and "Traceback" not in error
    return line


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--image", "none.png"), "--image must be a picture file, got 'none.png': no such file"),
        (("--image", "."), "--image must be a picture file, got '.': a folder"),
        (("--image", "https://a.b/c.png"), "--image must be a picture file, got 'https:/a.b/c.png': no such file"),
        (("--image", "text.png"), "--image must be a picture that Pillow reads, got 'text.png'"),
        (("--image", "cut.png"), "--image must be a picture that can be read, got 'cut.png'"),
        (("--mask", "photo.png"), "--mask must come with --image, got 'photo.png' alone"),
        (("--strength", 0.5), "--strength must come with --image, got '0.5' alone"),
        (("--image", "photo.png", "--strength", 0), "--strength must be above 0 and at most 1, got 0"),
        (("--image", "photo.png", "--strength", "nan"), "--strength must be above 0 and at most 1, got nan"),
        (("--option", "a"), "--option must be NAME=VALUE, got 'a'; for example"),
        (("--option", "=1"), "--option must be NAME=VALUE, got '=1'"),
        (("--option", "clip_skip=one"), "--option must have a value in JSON, got 'clip_skip=one'"),
        (("--option", "clip_skip=NaN"), "--option must have a value in JSON, got 'clip_skip=NaN'"),
        (("--option", f"clip_skip={'[' * 9999}"), "--option must have a value in JSON"),
        (("--option", "height=64"), "--option must not name height, got 'height=64'; use --size"),
        (("--option", "prompt_embeds=[1]"), "--option must be JSON or a picture, got 'prompt_embeds=[1]', a tensor"),
        (("--option", "a=1", "--option", "a=2"), "--option must give a once, got 'a=2' as well"),
        (("--option", "a=@none.png"), "--option a must be a picture file, got 'none.png': no such file"),
        (("--option", "foo=1"), "--option must name an argument that calls of FluxPipeline take, got 'foo'; they take"),
        (("--option", "prompt_3=1"), 'did you mean "prompt_2"?'),
        (("--image", "photo.png", "--image", "photo.png"), "--image must be given once for FluxImg2ImgPipeline, got 2"),
        (("--control-image", "photo.png"), "--control-image must be left out for FluxPipeline, whose calls take no"),
        (("--control-image", "photo.png"), "add a ControlNet with --controlnet, or --pipeline FluxControlNetPipeline"),
        (("--pipeline", "FluxPipelin"), "got 'FluxPipelin'; did you mean \"FluxPipeline\"?"),
        (("--pipeline", "AutoencoderKL"), "--pipeline must be a class of pipelines of diffusers, got 'AutoencoderKL'"),
        (("--pipeline", "FluxFillPipeline"), "--image must be given for FluxFillPipeline, got none"),
        (("--pipeline", "FluxFillPipeline", "--image", "photo.png"), "--mask must be given for FluxFillPipeline"),
    ],
)
def test_bad_inputs_are_refused_in_one_line_before_weights_are_loaded(
    command: Command,
    flux: Path,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: tuple[object, ...],
    words: str,
) -> None:
    from jitaccel import loading

    monkeypatch.setattr(loading, "load_pipeline", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:1000])
    status, _, error = command("generate", "--model", flux, *SHORT, *given, "--out", "a.png")
    assert status == 2 and words in last_line(error), error


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), "--image must be given for WanImageToVideoPipeline, got none"),
        (("--image", "photo.png", "--mask", "photo.png"), "--mask must be left out for WanImageToVideoPipeline"),
        (("--image", "photo.png", "--controlnet", "x"), "--controlnet must be left out for WanImageToVideoPipeline"),
    ],
)
def test_what_a_video_model_does_not_take_is_refused_before_weights_are_loaded(
    command: Command,
    wan: Path,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: tuple[object, ...],
    words: str,
) -> None:
    from jitaccel import loading

    monkeypatch.setattr(loading, "load_pipeline", None)
    monkeypatch.chdir(photo.parent)
    status, _, error = command("generate", "--model", wan, *SHORT, *given, "--out", "a.gif")
    assert status == 2 and words in last_line(error), error


def test_model_from_text_names_the_pipeline_that_takes_an_image(
    command: Command, folder: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jitaccel import loading

    monkeypatch.setattr(loading, "load_pipeline", None)
    for kind, other, out in (
        ("WanPipeline", "WanImageToVideoPipeline", "a.gif"),
        ("ChromaPipeline", "ChromaImg2ImgPipeline", "a.png"),
    ):
        model = folder / kind
        model.mkdir()
        (model / "model_index.json").write_text(f'{{"_class_name": "{kind}"}}')
        call = ("generate", "--model", model, *SHORT, "--image", photo, "--out", photo.with_name(out))
        status, _, error = command(*call)
        line = last_line(error)
        assert status == 2 and f"--image must be left out for {kind}, whose calls take no image" in line
        assert line.endswith(f"use a model made for it, or --pipeline {other} where its weights are made for that")


def test_value_that_a_pipeline_does_not_take_is_one_line(command: Command, flux: Path, tmp_path: Path) -> None:
    call = ("generate", "--model", flux, *SHORT, "--option", "prompt_2=7", "--out", tmp_path / "a.png")
    status, _, error = command(*call)
    assert status == 2 and "--option must be what FluxPipeline takes, got an error: `prompt_2`" in last_line(error)


def test_missing_package_of_a_pipeline_is_named(
    command: Command, wan: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.pipelines.wan import pipeline_wan_i2v

    monkeypatch.delattr(pipeline_wan_i2v, "ftfy", raising=False)
    call = ("generate", "--model", wan, *SHORT, "--image", photo, "--frames", 5, "--out", tmp_path / "a.gif")
    status, _, error = command(*call)
    assert status == 2 and "ftfy must be installed for WanImageToVideoPipeline, got none" in last_line(error)


@pytest.mark.usefixtures("_ftfy")
def test_speed_that_is_asked_for_counts_the_image(command: Command, wan: Path, photo: Path, tmp_path: Path) -> None:
    given = ("--image", photo, "--frames", 5, "--preset", "auto", "--target-ms", 1e6, "--out", tmp_path / "a.gif")
    status, said, error = command("generate", "--model", wan, *SHORT, *given)
    assert status == 0, error
    assert "auto: 50 steps" in said


def test_speed_is_not_planned_for_a_call_that_starts_late(
    command: Command, flux: Path, photo: Path, tmp_path: Path
) -> None:
    given = ("--image", photo, "--preset", "auto", "--target-ms", 1e6, "--out", tmp_path / "a.png")
    status, _, error = command("generate", "--model", flux, *SHORT, *given)
    assert status == 2 and "got FluxImg2ImgPipeline, whose calls need inputs that cannot" in last_line(error)


def test_several_images_are_for_pipelines_that_look_at_several() -> None:
    from jitaccel.cli.inputs import check_call
    from jitaccel.errors import CommandError

    given = {"image": [Image.new("RGB", (8, 8))] * 2}
    check_call(diffusers.Flux2Pipeline, given)
    check_call(type("Own", (diffusers.Flux2KleinPipeline,), {}), given)
    with pytest.raises(CommandError, match="must be given once for FluxKontextPipeline"):
        check_call(diffusers.FluxKontextPipeline, given)
