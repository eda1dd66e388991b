"""A subclass of FluxPipeline that passes both guidance branches as one batch and steps once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

import jitaccel
from jitaccel import PRESETS, JiTConfig, UnsupportedModelError
from tests.support import tiny
from tests.support.flux_pipelines import GUIDED
from tests.support.tiny import SHORT, counted, generate, relative_error

pytestmark = pytest.mark.usefixtures("nothing_global_changes")


class BatchedGuidance(FluxPipeline):  # type: ignore[misc]
    """Has its own loop, like custom pipelines; `arrange` makes the batch of the latents."""

    @staticmethod
    def arrange(latents: Tensor) -> Tensor:
        return torch.cat([latents] * 2)

    @torch.no_grad()
    def __call__(
        self, prompt: list[str], height: int, width: int, max_sequence_length: int, generator: Any, **call: Any
    ) -> tuple[Tensor]:
        negative = [call["negative_prompt"]] * len(prompt)
        embeds, pooled, text_ids = self.encode_prompt(
            [*negative, *prompt], None, max_sequence_length=max_sequence_length
        )
        channels = self.transformer.config.in_channels // 4
        latents, ids = self.prepare_latents(len(prompt), channels, height, width, embeds.dtype, "cpu", generator)
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.2, 5), mu=0.5)
        self.scheduler.set_begin_index(0)
        for timestep in self.scheduler.timesteps:
            batch = self.arrange(latents)
            velocity = self.transformer(
                hidden_states=batch,
                timestep=timestep.expand(len(batch)) / 1000,
                guidance=torch.full((len(batch),), 3.5),
                pooled_projections=pooled,
                encoder_hidden_states=embeds,
                txt_ids=text_ids,
                img_ids=ids,
                return_dict=False,
            )[0]
            unguided, guided = velocity.chunk(2)
            velocity = unguided + call["true_cfg_scale"] * (guided - unguided)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        self.maybe_free_model_hooks()
        return (latents,)


@pytest.fixture
def batched(pipe: Any) -> Any:
    return BatchedGuidance(**{**pipe.components, "scheduler": tiny.scheduler()})


@pytest.mark.parametrize("execution", ["indexed", "packed"])
@pytest.mark.parametrize("prompts", [["a red circle"], ["a red circle", "green"]], ids=["one", "two"])
@pytest.mark.parametrize(
    "config", [SHORT, PRESETS["7x-paper"], PRESETS["7x"], PRESETS["4x"]], ids=["exact", "7x-paper", "7x", "4x"]
)
def test_pictures_are_those_of_a_call_for_each_branch(
    pipe: Any, batched: Any, config: JiTConfig, prompts: list[str], execution: str
) -> None:
    seeds = tuple(range(len(prompts)))
    negative = {**GUIDED, "negative_prompt": [GUIDED["negative_prompt"]] * len(prompts)}
    with jitaccel.apply(pipe, config, execution=execution):
        apart = generate(pipe, seeds, prompt=prompts, **negative)
    with jitaccel.apply(batched, config, execution=execution) as handle, counted(batched.transformer) as seen:
        together = generate(batched, seeds, prompt=prompts, **GUIDED)
    assert relative_error(together, apart) < 1e-5
    rows = 2 * len(prompts)
    assert sum(seen) == sum(rows * step.tokens for step in handle.stats().steps) < rows * tiny.NUM_TOKENS * config.steps
    assert "2 branches of guidance come as one batch" in str(handle.stats().notes)


def test_two_pictures_of_one_noise_are_no_branches(pipe: Any) -> None:
    with jitaccel.apply(pipe, SHORT) as handle:
        together = generate(pipe, (3, 3), prompt=["a red circle", "green"])
        assert "branches" not in str(handle.stats().notes)
        alone = generate(pipe, (3,), prompt=["green"])
    assert relative_error(together[1:], alone) < 1e-5


@pytest.mark.parametrize(
    ("arrange", "numbers"),
    [
        (lambda latents: latents.repeat_interleave(2, dim=0), "a call with 4 images and a step with 2"),
        (lambda latents: torch.cat([latents, latents.flip(0)]), "a call with 4 images and a step with 2"),
        (lambda latents: torch.cat([latents, latents + 1e-3]), "a call with 4 images and a step with 2"),
    ],
    ids=["interleaved", "reversed", "changed"],
)
def test_batch_of_other_images_is_refused(batched: Any, arrange: Any, numbers: str) -> None:
    batched.arrange = arrange
    call = {"prompt": ["a red circle", "green"], **GUIDED}
    with jitaccel.apply(batched, SHORT) as handle:
        with pytest.raises(UnsupportedModelError, match=rf"{numbers}; call it with torch.cat.*remove\(\) the handle"):
            generate(batched, (1, 2), **call)
        handle.remove()
        assert generate(batched, (1, 2), **call).isfinite().all()
