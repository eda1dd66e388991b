"""`jitaccel.apply` on a diffusers FluxPipeline together with hooks, LoRA and compilation, and with bad settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook

import jitaccel
from tests.support.flux_pipelines import attributes, changed
from tests.support.tiny import DENSE, SHORT, generate, relative_error

pytestmark = pytest.mark.usefixtures("nothing_global_changes")


class _Passing(ModelHook):  # type: ignore[misc]
    """Another package's hook: counts, and changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("order", ["before", "after"])
def test_other_hooks_on_the_transformer_stay(pipe: Any, order: str) -> None:
    plain = generate(pipe, num_inference_steps=4)
    hook = _Passing()

    def register() -> None:
        HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(hook, "other")

    if order == "before":
        register()
    handle = jitaccel.apply(pipe, SHORT)
    if order == "after":
        register()
    sparse = generate(pipe)
    assert hook.calls == 5
    handle.remove()
    assert torch.equal(generate(pipe, num_inference_steps=4), plain)
    assert hook.calls == 9
    with jitaccel.apply(pipe, SHORT):
        assert torch.equal(generate(pipe), sparse)
    pipe.transformer._diffusers_hook.remove_hook("other")
    assert torch.equal(generate(pipe, num_inference_steps=4), plain)


def test_lora_and_its_scale_are_honoured(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    seeds = (1, 2)
    half: dict[str, Any] = {"prompt": ["a", "red"], "joint_attention_kwargs": {"scale": 0.5}}
    plain = generate(pipe, seeds, num_inference_steps=3, **half)
    assert not torch.equal(generate(pipe, seeds, num_inference_steps=3, prompt=half["prompt"]), plain)
    with jitaccel.apply(pipe, DENSE):
        assert torch.equal(generate(pipe, seeds, num_inference_steps=3, **half), plain)
    with jitaccel.apply(pipe, SHORT):
        together = generate(pipe, seeds, **half)
        alone = generate(pipe, seeds[1:], prompt=["red"], joint_attention_kwargs={"scale": 0.5})
        torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-5)
        assert relative_error(generate(pipe, seeds, prompt=half["prompt"]), together) > 1e-3


def test_compiled_transformer_gives_the_same_image(pipe: Any) -> None:
    config = SHORT.replace(densities=(0.5, 1.0), boundaries=(0.5, 1.0), steps=2)
    dense = generate(pipe, num_inference_steps=1, grid=(6, 6))  # makes diffusers' registry on the inner module, too
    with jitaccel.apply(pipe, config):
        sparse = generate(pipe, grid=(6, 6))
    plain = pipe.transformer
    compiled = pipe.transformer = torch.compile(plain, backend="eager", dynamic=False)
    before = dict(vars(compiled)), dict(vars(plain))
    try:
        for _ in range(2):
            handle = jitaccel.apply(pipe, config)
            assert relative_error(generate(pipe, grid=(6, 6)), sparse) < 1e-5
            assert "forward" not in vars(plain)  # the hook is around the graph, not in it
        handle.remove()
        assert not changed(before[0], vars(compiled)) and not changed(before[1], vars(plain))
        assert relative_error(generate(pipe, num_inference_steps=1, grid=(6, 6)), dense) < 1e-5
    finally:
        torch._dynamo.reset()


def _refuses(match: str, **overrides: Any) -> Callable[[Any], None]:
    def check(pipe: Any) -> None:
        with pytest.raises(jitaccel.ConfigError, match=match):
            jitaccel.apply(pipe, **overrides)

    return check


@pytest.mark.parametrize(
    "check",
    [
        _refuses(
            "must be one of 4x, 7x, 10x, few-steps, 4x-paper, 7x-paper, .*got '8x'; choose one of these", preset="8x"
        ),
        _refuses('relax_step must be an argument .* field of JiTConfig.*did you mean "relax_steps"', relax_step=2),
        _refuses("densities must rise strictly", densities=(0.6, 0.5, 1.0)),
    ],
)
def test_bad_settings_change_nothing(pipe: Any, check: Callable[[Any], None]) -> None:
    before = attributes(pipe)
    check(pipe)
    assert not changed(before, attributes(pipe))
