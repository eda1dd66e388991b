"""vLLM-Omni's own FLUX.1 pipeline, accelerated. Only the engine imports this file; it registers it as `FluxPipeline`.

Only the loop is replaced. The network is called from outside, as a whole, so the engine's hooks inside it (tensor
parallelism, offloading, compiled blocks) see the anchors as an ordinary sequence. If guidance branches run on several
ranks, each rank has the whole state and decides from the same guided velocity, so all ranks agree. See docs/engines.md.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor
from vllm_omni.diffusion.models.flux.pipeline_flux import FluxPipeline, get_flux_post_process_func

from jitaccel.errors import UnsupportedModelError

from .flux_loop import FluxLoop, config_of, of_arguments, own_levels
from .settings import asked

__all__ = ["JitFluxPipeline", "get_flux_post_process_func"]  # the engine looks up both
_log = logging.getLogger(__name__)


class JitFluxPipeline(FluxPipeline):  # type: ignore[misc]
    """The engine's `FluxPipeline` with jitaccel's loop, and with the preset's steps and levels."""

    def __init__(self, *, od_config: Any, prefix: str = "") -> None:
        super().__init__(od_config=od_config, prefix=prefix)
        self._jit_config = config_of(asked(os.environ) or {})
        self._jit_levels: tuple[float, ...] = ()
        if self._jit_config.steps == "caller":
            raise UnsupportedModelError(
                'jitaccel: steps must be a number in vLLM-Omni, got "caller"; set steps in JITACCEL_CONFIG'
            )
        if getattr(od_config, "cache_backend", None) not in (None, "none"):
            raise UnsupportedModelError(
                f"jitaccel: cache_backend must be none, got {od_config.cache_backend!r}, which reuses results of other "
                f"tokens; leave it out"
            )
        _log.warning("jitaccel: vLLM-Omni's FluxPipeline is accelerated, %s", self._jit_config)

    def prepare_timesteps(self, num_inference_steps: int, sigmas: Any, image_seq_len: int) -> tuple[Tensor, int]:
        """Returns the preset's timesteps instead of those that a request asks for."""
        steps = self._jit_config.steps
        assert isinstance(steps, int)
        timesteps, _ = super().prepare_timesteps(steps, None, image_seq_len)
        levels = own_levels(self._jit_config)
        if levels is None:
            levels = tuple(self.scheduler.sigmas.tolist())
        else:
            timesteps = torch.tensor([1000 * level for level in levels[:-1]]).to(timesteps)
        self._jit_levels = levels
        return timesteps, steps

    def diffuse(
        self,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor,
        negative_pooled_prompt_embeds: Tensor,
        latents: Tensor,
        latent_image_ids: Tensor,
        text_ids: Tensor,
        negative_text_ids: Tensor,
        timesteps: Tensor,
        do_true_cfg: bool,
        guidance: Tensor,
        true_cfg_scale: float,
        cfg_normalize: bool = False,
    ) -> Tensor:
        """Returns the final state (B, N, D); the arguments are those of the engine's own loop."""
        self.transformer.do_true_cfg = do_true_cfg
        loop = FluxLoop(self._jit_config, self._jit_levels, latents, latent_image_ids, prompt_embeds.shape[1])

        def predict(positive: Any, negative: Any) -> Tensor:
            guided: Tensor = self.predict_noise_maybe_with_cfg(
                do_true_cfg, true_cfg_scale, positive, negative, cfg_normalize
            )
            return guided

        for index, timestep in enumerate(timesteps):
            if self.interrupt:
                break
            self._current_timestep = timestep
            level = timestep.expand(latents.shape[0]).to(device=latents.device, dtype=latents.dtype) / 1000
            shared = {
                "hidden_states": latents,
                "timestep": level,
                "guidance": guidance,
                "img_ids": latent_image_ids,
                "joint_attention_kwargs": self.joint_attention_kwargs,
                "return_dict": False,
            }
            positive = {
                **shared,
                "pooled_projections": pooled_prompt_embeds,
                "encoder_hidden_states": prompt_embeds,
                "txt_ids": text_ids,
            }
            negative = {
                **shared,
                "pooled_projections": negative_pooled_prompt_embeds,
                "encoder_hidden_states": negative_prompt_embeds,
                "txt_ids": negative_text_ids,
            }
            network = of_arguments(positive, negative if do_true_cfg else None, predict)
            latents = loop.advance(index, network, 2 if do_true_cfg else 1)
        shown = loop.tokens()
        _log.info("jitaccel: %d steps, image tokens %s", len(shown), shown)
        return latents
