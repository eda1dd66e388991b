"""One running ComfyUI sampling: its progress, and the inputs and results of its network and guider."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jitaccel.errors import UnsupportedModelError
from jitaccel.execution.private import uncompiled
from jitaccel.generation.route import Answer, Generation, History, fold_move
from jitaccel.method.config import JiTConfig
from jitaccel.method.grid import num_tokens_of
from jitaccel.method.run import Run, stage_tokens_of
from jitaccel.method.steps import KnownLevels, Step

from ..flux.arguments import shown_timestep
from ..flux.flops import chroma_flops, flux2_flops, flux_flops
from ..flux.params import config_of
from ..layout import to_picture, to_tokens
from ..split import Branches, Split

_NOT_RUN = (
    "jitaccel: the model must run for every estimate of its guider, got an estimate without a call of the model; "
    "another node answered in its place (a cache?), or no condition applies at this step: remove the node, or JiT Apply"
)


class UnderWay:
    """One running sampling.

    Args:
        config: The configuration to run.
        model: The diffusion model, possibly compiled.
        levels: The noise levels of the sampler, 0 included.
        noise: (B, C, H, W), as the sampler got it.
        history: Records the generation.
        mask: The area to repaint, (1 or B, K, H, W); None for the whole picture.
        keeps_rest: Whether the sampler keeps the area outside the mask as in the given picture.
    """

    def __init__(
        self,
        config: JiTConfig,
        model: Any,
        levels: Sequence[float],
        noise: Tensor,
        history: History,
        mask: Tensor | None = None,
        keeps_rest: bool = False,
    ) -> None:
        # Repainted tokens are active from the first stage on. If the rest is given, no token ever has to be moved.
        self._config = config.replace(micro_flow="none") if keeps_rest else config
        self._clock = KnownLevels(config, levels)
        self._model = uncompiled(model)
        self._patch: int = self._model.patch_size
        self._mask, self._keeps_rest = mask, keeps_rest
        self._size = tuple(noise.shape[2:])
        self._grid = (-(-noise.shape[2] // self._patch), -(-noise.shape[3] // self._patch))
        self._images = noise.shape[0]
        self._index = -1
        self._history = history
        self._generation: Generation | None = None
        self._has_run = False
        self._preview: Tensor | None = None  # the network's own clean estimate, if the returned one differs from it

    @property
    def num_steps(self) -> int:
        """Number of steps the sampler takes."""
        return self._clock.num_steps

    def check_finite(self) -> None:
        """Raises NonFiniteVelocityError if the network returned NaN or infinity since the last stage."""
        if self._generation is not None:
            self._generation.run.check_finite()

    def mask_problems(self, noise: Tensor) -> list[str]:
        """Returns why the masks of a batch cannot be accelerated correctly; empty if they can. Waits for the device."""
        try:
            stage_tokens_of(self._config, self._grid, self._forced(to_tokens(noise, self._patch)))
        except UnsupportedModelError as error:
            return [str(error).removeprefix("jitaccel: ")]
        return []

    def shown_to(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a sampler callback that gets the network's own clean estimate, for previews.

        The sampler's estimate contains the move of new tokens, or a solver's correction, so that its Euler step ends at
        the right state. It does not look like a picture.

        Args:
            callback: Takes (step, denoised, state, number of steps), or a single dict that holds "denoised".
        """

        def shown(first: Any, *rest: Any, **more: Any) -> Any:
            preview = self._preview
            if preview is None:
                return callback(first, *rest, **more)
            if isinstance(first, dict) and "denoised" in first:
                return callback({**first, "denoised": preview}, *rest, **more)
            return callback(first, preview, *rest[1:], **more) if rest else callback(first, **more)

        return shown

    # The guider's side: states and estimates in float32

    def predict(self, denoise: Callable[[Tensor], Tensor], x: Tensor, level: Tensor) -> Tensor:
        """Returns the estimate (B, C, H, W) whose Euler step takes the sampler to the state the method requires.

        Args:
            denoise: Returns the guided estimate of a state.
            x: The sampler's state.
            level: (B,), the same for every image.
        """
        step = self._next_step(float(level.flatten()[0]))
        state = to_tokens(x, self._patch)
        generation = self._generation = self._generation or self._begin(step, state)
        entered = generation.enter(step, state)
        is_moved, self._has_run, self._preview = entered is not state, False, None
        seen = to_picture(entered, self._grid, self._patch, self._size) if is_moved else x
        estimate = denoise(seen)
        if not self._has_run:
            raise RuntimeError(_NOT_RUN)
        velocity = (entered - to_tokens(estimate, self._patch)) / step.noise_level
        lifted = generation.leave(step, entered, Answer(generation.run.gather(velocity)))
        if lifted is velocity and not is_moved:
            return estimate
        if not self._keeps_rest:  # otherwise the sampler itself inserts the rest into the estimate, and nothing moves
            shown = entered - step.noise_level * generation.run.before_solver(step, entered, lifted)
            self._preview = to_picture(shown, self._grid, self._patch, self._size).to(estimate.dtype)
        lifted = fold_move(lifted, entered - state if is_moved else None, step)
        returned = to_picture(state - step.noise_level * lifted, self._grid, self._patch, self._size)
        return returned.to(estimate.dtype)

    def _begin(self, step: Step, state: Tensor) -> Generation:
        """Returns the generation at its first step; its cost becomes known when the network is called."""
        forced = self._forced(state)
        generation = Generation(
            self._config,
            self._grid,
            step,
            state,
            cost=lambda *_: 0,
            text_tokens=0,
            forced=lambda: forced,
            patch=self._patch,
        )
        self._history.begin(generation)
        return generation

    def _next_step(self, level: float) -> Step:
        self._index += 1
        step = self._clock.step(self._index) if self._index < self._clock.num_steps else None
        if step is None or abs(level - step.noise_level) > 1e-6:
            expected = "no more step" if step is None else f"step {self._index} at level {step.noise_level:g}"
            raise RuntimeError(
                f"jitaccel: the sampler must ask for each of its levels once, in order, got level {level:g} but "
                f"{expected} is next; use the sampler 'euler'"
            )
        return step

    def _forced(self, state: Tensor) -> Tensor | None:
        """Returns the tokens (B, N) to repaint, or None for all."""
        if self._mask is None:
            return None
        masked = to_tokens(self._mask.to(state).expand(self._images, -1, *self._size), self._patch)
        return (masked > 0).any(dim=2)

    # The network's side: one batch of branches

    def diffuse(self, model: Any, x: Tensor, forward: Callable[[], Tensor]) -> Tensor:
        """Returns the result of `forward` on a batch of branches `x`, computed on the anchors only.

        ComfyUI's own code makes tokens and position ids, and turns the result back into pictures. The model's
        `forward_orig`, called in between, is replaced during this call.
        """
        branches = x.shape[0] // self._images
        if self._generation is None or tuple(x.shape[2:]) != self._size or branches * self._images != x.shape[0]:
            raise UnsupportedModelError(
                f"jitaccel: the model must be called for {self._images} pictures of {self._size} in its sampler, got "
                f"{tuple(x.shape)}; remove JiT Apply to use conditions for parts of a picture"
            )
        # Another node may have replaced it, with other argument names; it is called as ComfyUI calls it.
        original, has_run = model.forward_orig, False
        signature = inspect.signature(type(model).forward_orig)

        def forward_orig(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal has_run
            has_run = self._has_run = True
            given = signature.bind(model, *args, **kwargs)
            return self._at_anchors(lambda: original(*given.args[1:], **given.kwargs), given.arguments, branches)

        before = vars(model).get("forward_orig")
        vars(model)["forward_orig"] = forward_orig
        try:
            output = forward()
        finally:
            if before is None:
                del vars(model)["forward_orig"]
            else:
                vars(model)["forward_orig"] = before
        if not has_run:
            raise RuntimeError(_NOT_RUN)
        return output

    def _at_anchors(self, original: Callable[[], Tensor], arguments: dict[str, Any], branches: int) -> Tensor:
        """Returns the result of `original` on the arguments, cut to the anchors."""
        generation, step = self._generation, self._clock.step(self._index)
        assert generation is not None
        split = Split(arguments["img"], num_tokens_of(self._grid), self._model.out_channels)
        self._note_costs(generation, split, arguments["txt"].shape[1])
        places = Branches(generation.run, branches)

        def network(run: Run, state: Tensor) -> Answer:
            if run.is_dense:
                return Answer(original())
            _thin_out(arguments, split, places, state)
            return Answer(original()[:, : run.num_active])

        answer = generation.evaluate(step, split.state, network, branches)
        return answer.values if generation.run.is_dense else split.whole(places.scatter(answer.values))

    def _note_costs(self, generation: Generation, split: Split, text_tokens: int) -> None:
        recorder = generation.recorder
        if recorder.text_tokens:
            return
        params = self._model.params
        config = config_of(params, split.hidden.shape[2], split.channels)
        is_flux2 = getattr(params, "global_modulation", False)
        flops = chroma_flops if hasattr(params, "n_layers") else flux2_flops if is_flux2 else flux_flops
        recorder.text_tokens, references = text_tokens, split.num_references  # numbers, so that no tensor is kept alive
        recorder.cost = lambda image_tokens, text: flops(config, image_tokens + references, text)


def _thin_out(arguments: dict[str, Any], split: Split, places: Branches, state: Tensor) -> None:
    """Cuts the arguments of ComfyUI's `forward_orig`, in place, to the anchors of a state (branches * B, N, D)."""
    text_tokens = arguments["txt"].shape[1]
    arguments["img"] = split.tokens(places, state)
    arguments["img_ids"] = torch.stack(
        [split.ids_at(own, at) for own, at in zip(arguments["img_ids"], places.positions, strict=True)]
    )
    arguments["timesteps"] = shown_timestep(places.run, arguments["timesteps"])
    if arguments.get("control") is not None:
        arguments["control"] = _control_at(arguments["control"], split, places)
    if arguments.get("timestep_zero_index"):  # stretches of references, counted among the image tokens
        absent = split.num_tokens - places.run.num_active
        arguments["timestep_zero_index"] = [
            [place - absent for place in stretch] for stretch in arguments["timestep_zero_index"]
        ]
    if arguments.get("attn_mask") is not None:
        arguments["attn_mask"] = _mask_at(arguments["attn_mask"], split, places, text_tokens)


def _control_at(control: Any, split: Split, places: Branches) -> Any:
    """Returns a ControlNet's residuals, lists of (B, N or N + R, width) or None by name, at the anchors."""
    batch, total = split.hidden.shape[:2]

    def at_anchors(residual: Tensor | None) -> Tensor | None:
        if residual is None:
            return None
        if residual.shape[1] not in (split.num_tokens, total):
            raise UnsupportedModelError(
                f"jitaccel: a ControlNet's residuals must cover every image token, {split.num_tokens} or {total}, got "
                f"{residual.shape[1]}; remove JiT Apply or the ControlNet"
            )
        return split.entering(places.show_features, residual.expand(batch, *residual.shape[1:]))

    return {name: [at_anchors(residual) for residual in residuals] for name, residuals in control.items()}


def _mask_at(mask: Tensor, split: Split, places: Branches, text_tokens: int) -> Tensor:
    """Cuts an attention mask (T + S, T + S) or (B, T + S, T + S) to the text and the image tokens that enter."""
    batch, total = split.hidden.shape[0], text_tokens + split.hidden.shape[1]
    if mask.ndim not in (2, 3) or mask.shape[-2:] != (total, total):
        raise UnsupportedModelError(
            f"jitaccel: attn_mask must be square over {total} text and image tokens, got {tuple(mask.shape)}; "
            f"remove JiT Apply or the node that makes it"
        )
    mask = mask.expand(batch, total, total)
    rows = split.entering(places.gather, mask, before=text_tokens)
    return split.entering(places.gather, rows.transpose(1, 2), before=text_tokens).transpose(1, 2)
