"""Properties of every patch: one handle per target, applied and removed in any order, completely or not at all.

`tests/support/patched.py` has every registered patch, including the tutorial's; `test_no_patch_is_left_out` checks
that.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import nn

import jitaccel
from jitaccel import ConfigError, patches
from jitaccel.generation import registry
from jitaccel.generation.handle import Handle
from tests.support import comfy_stand_in as comfy
from tests.support.patched import CASES, Case, picture_of
from tests.support.tiny import SHORT


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    comfy.install(monkeypatch)
    monkeypatch.setattr(patches, "_REGISTERED", [])
    yield CASES[request.param]
    gc.collect()


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
