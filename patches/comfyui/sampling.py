"""ComfyUI's FLUX.1, FLUX.2 and Chroma, patched through the wrappers of `ModelPatcher`; ComfyUI's code stays in place.

Three wrappers share the work:

- `SAMPLER_SAMPLE` gets the sampler, noise levels and mask. It checks a sampling and starts it.
- `PREDICT_NOISE` gets the state in float32 before guidance and returns the guided estimate. It moves the state, lifts
  the velocity, and folds the move into the returned estimate.
- `DIFFUSION_MODEL` runs the network on the anchors, for any number of branches that ComfyUI puts into one batch.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jitaccel.errors import ConfigError, UnsupportedModelError
from jitaccel.execution.options import Execution
from jitaccel.generation.handle import Handle, Installation, Uncopied
from jitaccel.generation.route import History
from jitaccel.generation.stats import Stats
from jitaccel.method.config import JiTConfig

from ..network import IndexedCalls
from .conditions import fill_mask, sampling_problems, wrappers_of_comfy
from .underway import UnderWay

_KEY = "jitaccel"
_log = logging.getLogger(__name__)


def prepare(patcher: Any, config: JiTConfig, levels: tuple[float, ...] | None, execution: Execution) -> Installation:
    """Returns the installation for a `ModelPatcher`; clones of the patcher inherit it."""
    if levels is not None:
        raise ConfigError(
            "apply: noise_levels must be left out for ComfyUI, where the sampler sets them, got a list; "
            "give the sampler the levels of JiT Sigmas"
        )
    names = wrappers_of_comfy()
    route = ComfyRoute(config, IndexedCalls("ComfyUI's models", execution), execution)
    # A model compiled as a whole runs its wrappers while it is traced; this one must not be traced.
    wrappers = (route.sample, route.predict, torch.compiler.disable(route.diffuse))

    def put(patcher: Any, handle: Handle) -> None:
        for name in names:  # wrappers inherited from an earlier apply to the model this was cloned from
            for wrapper in patcher.get_wrappers(name, _KEY):
                _remove(weakref.ref(patcher), name, wrapper)
        for name, wrapper in zip(names, wrappers, strict=True):
            handle.change(f"ModelPatcher wrapper {name!r}", _remove, weakref.ref(patcher), name, wrapper)
            patcher.add_wrapper_with_key(name, _KEY, wrapper)

    return Installation(route=route, install=put)


def _remove(of: weakref.ref[Any], name: str, wrapper: Any) -> None:
    """Removes a key's wrappers if ours is still among them; ComfyUI can only remove all wrappers of a key at once."""
    patcher = of()
    if patcher is not None and wrapper in patcher.get_wrappers(name, _KEY):
        patcher.remove_wrappers_with_key(name, _KEY)


class ComfyRoute(Uncopied):
    """The samplings of one model and its clones, one at a time."""

    def __init__(self, config: JiTConfig, calls: IndexedCalls, execution: Execution) -> None:
        self.config = config
        self.calls = calls
        self._may_be_dense = execution.may_be_dense
        self._now: UnderWay | None = None
        self._history = History(config, "ComfyUI", calls)

    @property
    def history(self) -> History:
        """The record of the generations."""
        return self._history

    def stats(self) -> Stats:
        """Returns the statistics of the last sampling."""
        return self._history.stats()

    def reset(self) -> None:
        """Forgets the current sampling."""
        self._now = None

    def sample(
        self,
        executor: Any,
        guider: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        *rest: Any,
        **more: Any,
    ) -> Any:
        """Wraps a sampler's `sample`. If it cannot be accelerated, raises UnsupportedModelError or runs it dense."""
        given = (guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *rest)
        problems = sampling_problems(executor.class_obj, guider, sigmas, extra_args, noise)
        now = None
        if not problems:
            model, keeps_rest = guider.inner_model.diffusion_model, denoise_mask is not None
            mask = denoise_mask if keeps_rest else fill_mask(guider, noise.shape[1])
            now = UnderWay(self.config, model, sigmas.tolist(), noise, self._history, mask, keeps_rest)
            problems = now.mask_problems(noise)
        if now is None or problems:
            reason = "jitaccel: this sampling cannot be accelerated correctly: " + "; ".join(problems)
            if not self._may_be_dense:
                raise UnsupportedModelError(f'{reason}; set on_unsupported="dense" in JiT Apply to run it dense')
            _log.warning("%s; it runs dense", reason)
            self._history.show(None)
            self._history.notes = (f"the last sampling ran dense: {'; '.join(problems)}",)
            return executor(*given, **more)
        self._note_steps(now.num_steps)
        before, self._now = self._now, now
        seen = None if callback is None else now.shown_to(callback)
        try:
            result = executor(guider, sigmas, extra_args, seen, *given[4:], **more)
            now.check_finite()
        finally:
            self._now = before
        return result

    def _note_steps(self, steps: int) -> None:
        self._history.notes = ()
        if self.config.steps not in ("caller", steps):
            asked = self.config.steps
            self._history.notes = (f"the sampler takes {steps} steps; the configuration asks for {asked}",)

    def predict(self, executor: Any, x: Tensor, timestep: Tensor, *rest: Any, **more: Any) -> Tensor:
        """Wraps a guider's `predict_noise`: the denoised estimate of a state (B, C, H, W) at one level."""
        if self._now is None:
            return executor(x, timestep, *rest, **more)
        return self._now.predict(lambda state: executor(state, timestep, *rest, **more), x, timestep)

    def diffuse(self, executor: Any, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        """Wraps a model's forward on a batch (branches * B, C, H, W)."""
        forward: Callable[[], Tensor] = lambda: executor(x, *rest, **more)  # noqa: E731
        return forward() if self._now is None else self._now.diffuse(executor.class_obj, x, forward)
