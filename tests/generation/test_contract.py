"""What holds of every patch: one handle a target, applied and removed in any order, whole or not at all.

Every registered patch is here, that of the tutorial included; `test_no_patch_is_left_out` sees to it.
"""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import jitaccel
from jitaccel import ConfigError, patches
from jitaccel.generation import registry
from jitaccel.generation.handle import Handle
from tests.support import comfy_stand_in as comfy
from tests.support import tiny
from tests.support.comfy_stand_in import BaseModel, ModelPatcher
from tests.support.every_model import wan_transformer
from tests.support.models import chroma_transformer, flux2_transformer
from tests.support.pipelines import chroma_pipeline, flux2_pipeline
from tests.support.tiny import CHANNELS, SHORT
from tests.support.video import wan_pipeline

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"


@dataclass(frozen=True)
class Case:
    """patch: its place in the registry. make: returns a new target. parts: the modules that hold its weights."""

    patch: str
    make: Callable[[], Any]
    parts: Callable[[Any], list[nn.Module]] = lambda target: [target]


@functools.cache
def _tutorial() -> tuple[type[nn.Module], patches.Patch]:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(next(block for block in blocks if "class Toy" in block), names)
    return names["Toy"], patches._REGISTERED[0]


def _toy() -> Any:
    kind, patch = _tutorial()
    patches.register(patch)
    return kind()


def _bfl() -> Any:
    from tests.support.bfl_wrapped import Flux

    return Flux().eval()


def _comfy() -> Any:
    model = comfy.Flux(tiny.transformer(), patch_size=2, channels=CHANNELS // 4).eval()
    return ModelPatcher(BaseModel(model))


CASES = {
    "FluxPipeline": Case("diffusers FluxPipeline", tiny.pipeline, lambda pipe: [pipe.transformer]),
    "Flux2Pipeline": Case(
        "diffusers FluxPipeline", lambda: flux2_pipeline("Flux2Pipeline"), lambda pipe: [pipe.transformer]
    ),
    "ChromaPipeline": Case(
        "diffusers FluxPipeline", lambda: chroma_pipeline("ChromaPipeline"), lambda pipe: [pipe.transformer]
    ),
    "FLUX.1 transformer": Case("diffusers FluxTransformer2DModel", tiny.transformer),
    "FLUX.2 transformer": Case("diffusers FluxTransformer2DModel", flux2_transformer),
    "Chroma transformer": Case("diffusers FluxTransformer2DModel", chroma_transformer),
    "WanPipeline": Case(
        "diffusers WanPipeline",
        lambda: wan_pipeline(boundary=0.8),
        lambda pipe: [pipe.transformer, pipe.transformer_2],
    ),
    "Wan transformer": Case("diffusers WanTransformer3DModel", wan_transformer),
    "BFL Flux": Case("black-forest-labs", _bfl),
    "ComfyUI": Case("ComfyUI", _comfy, lambda patcher: [patcher.model.diffusion_model]),
    "tutorial": Case("toy", _toy),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    comfy.install(monkeypatch)
    monkeypatch.setattr(patches, "_REGISTERED", [])
    yield CASES[request.param]
    gc.collect()


def picture_of(target: Any) -> dict[str, Any]:
    """Returns everything on a target's instances that a patch could have changed."""
    owners = [target, *(getattr(target, name, None) for name in ("transformer", "transformer_2", "scheduler"))]
    found: dict[str, Any] = {}
    for place, owner in enumerate(owners):
        if owner is None:
            continue
        own = {name: value for name, value in vars(owner).items() if not isinstance(value, torch.Tensor)}
        found |= {f"{place}.{name}": _shown(value) for name, value in own.items()}
    return found


def _shown(value: Any) -> Any:
    if isinstance(value, dict):  # ComfyUI itself keeps an empty entry for a key whose wrappers were removed
        return {key: _shown(each) for key, each in value.items() if each != {}}
    if isinstance(value, (list, tuple)):
        return [_shown(each) for each in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else (type(value).__name__, id(value))


def test_no_patch_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    covered = [case.patch for case in CASES.values()]
    assert all(any(patch.name.startswith(name) for name in covered) for patch in patches.PATCHES)


def test_removal_restores_every_bit_and_twice_is_once(case: Case) -> None:
    target = case.make()
    before = picture_of(target)
    handle = jitaccel.apply(target, SHORT)
    assert handle.is_active and jitaccel.handle_of(target) is handle and picture_of(target) != before
    handle.remove()
    assert picture_of(target) == before and jitaccel.handle_of(target) is None
    handle.remove()
    assert picture_of(target) == before and not handle.is_active


def test_applied_again_replaces_what_stood(case: Case) -> None:
    target = case.make()
    before = picture_of(target)
    first = jitaccel.apply(target, SHORT)
    second = jitaccel.apply(target, SHORT)
    assert not first.is_active and second.is_active and jitaccel.handle_of(target) is second
    first.remove()
    assert second.is_active and jitaccel.handle_of(target) is second
    second.remove()
    assert picture_of(target) == before


@pytest.mark.parametrize("first", [0, 1])
def test_two_targets_are_removed_in_any_order(case: Case, first: int) -> None:
    targets = [case.make(), case.make()]
    pictures = [picture_of(target) for target in targets]
    handles = [jitaccel.apply(target, SHORT) for target in targets]
    handles[first].remove()
    assert picture_of(targets[first]) == pictures[first] and handles[1 - first].is_active
    handles[1 - first].remove()
    assert [picture_of(target) for target in targets] == pictures


def test_lost_handle_is_found_and_removed(case: Case) -> None:
    target = case.make()
    before = picture_of(target)
    jitaccel.apply(target, SHORT)
    gc.collect()
    assert jitaccel.remove(target) is True
    assert picture_of(target) == before and jitaccel.remove(target) is False


def test_refused_settings_leave_what_stood(case: Case) -> None:
    target = case.make()
    handle = jitaccel.apply(target, SHORT)
    before = picture_of(target)
    with pytest.raises(ConfigError):
        jitaccel.apply(target, SHORT, controlnet="anchor")
    assert handle.is_active and jitaccel.handle_of(target) is handle and picture_of(target) == before


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("stands", [False, True], ids=["alone", "over another"])
def test_apply_that_fails_at_any_change_leaves_what_stood(
    case: Case, stands: bool, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = case.make()
    untouched = picture_of(target)
    old = jitaccel.apply(target, SHORT) if stands else None
    original, reached = Handle.change, 0
    for fails_at in range(10):
        calls = 0

        def change(self: Handle, *args: Any, fails_at: int = fails_at) -> None:
            nonlocal calls
            if self is not old and calls == fails_at:
                raise kind("injected")
            calls += self is not old
            original(self, *args)

        monkeypatch.setattr(Handle, "change", change)
        try:
            new = jitaccel.apply(target, SHORT)
        except kind:
            reached += 1
            assert jitaccel.handle_of(target) is old
            assert old.is_active if old is not None else picture_of(target) == untouched
            continue
        finally:
            monkeypatch.setattr(Handle, "change", original)
        new.remove()
        break
    assert reached > 0 and picture_of(target) == untouched


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_removal_that_fails_anywhere_can_be_finished(case: Case, kind: type[BaseException]) -> None:
    target = case.make()
    before = picture_of(target)
    number = len(jitaccel.apply(target, SHORT)._undo)
    for fails_at in range(number):
        handle = jitaccel.apply(target, SHORT)
        undo, has_failed = handle._undo[fails_at], []

        def failing(undo: Any = undo, has_failed: list[bool] = has_failed) -> None:
            if not has_failed:
                has_failed.append(True)
                raise kind("injected")
            undo()

        handle._undo[fails_at] = failing
        with pytest.raises(kind):
            handle.remove()
        handle.remove()
        assert has_failed and picture_of(target) == before and jitaccel.handle_of(target) is None


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps], ids=["deep copy", "pickle"])
def test_copies_of_what_is_patched_are_refused(case: Case, copied: Callable[[Any], Any]) -> None:
    target = case.make()
    of = [target] if case.patch == "ComfyUI" else case.parts(target)
    if copied is pickle.dumps and case.patch in ("ComfyUI", "toy"):
        pytest.skip("a class of a test's own has no name that pickle finds")
    with jitaccel.apply(target, SHORT):
        for part in of:
            with pytest.raises(TypeError, match="must not be patched"):
                copied(part)


def test_kept_handle_keeps_no_model_alive(case: Case) -> None:
    target = case.make()
    parts = [weakref.ref(part) for part in case.parts(target)]
    handle, gone = jitaccel.apply(target, SHORT), weakref.ref(target)
    del target
    gc.collect()
    assert gone() is None and [part() for part in parts] == [None] * len(parts)
    assert handle.target is None
    handle.remove()
    assert all(known is not handle for _, known in registry._HANDLES.values())


@pytest.mark.parametrize("target", [None, "black-forest-labs/FLUX.1-dev", 3])
@pytest.mark.parametrize("on_unsupported", ["error", "dense"])
def test_what_is_no_object_is_refused(target: Any, on_unsupported: Any) -> None:
    with pytest.raises(ConfigError, match="apply: target must be a loaded pipeline or network"):
        jitaccel.apply(target, on_unsupported=on_unsupported)


def test_target_left_dense_is_known_by_its_handle() -> None:
    target = nn.Linear(2, 2)
    handle = jitaccel.apply(target, on_unsupported="dense")
    assert jitaccel.handle_of(target) is handle and not handle.is_active
    assert jitaccel.remove(target) and jitaccel.handle_of(target) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [("executon", '"execution"'), ("atention", '"attention"'), ("step", '"steps"'), ("zzzzzz", "help")],
)
def test_unknown_arguments_are_refused_by_apply_with_what_is_like_them(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"apply: {name} must be .*{words}"):
        jitaccel.apply(nn.Linear(2, 2), **{name: "packed"})
