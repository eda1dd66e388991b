"""diffusers' FLUX.1 as exported stages: the stages as modules, and a stand-in that runs them as the transformer."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from jitaccel.artefacts.export import Exportable, Exported
from jitaccel.errors import ConfigError, UnsupportedModelError
from jitaccel.execution.attention.choice import Backend, choose_backend
from jitaccel.execution.packing import PackedLayout
from jitaccel.generation.handle import Handle, Installation
from jitaccel.generation.route import Answer
from jitaccel.limits import MOST_SIDE
from jitaccel.method.anchors import first_anchors
from jitaccel.method.config import JiTConfig
from jitaccel.method.lift import LiftPlan, make_lift_plan
from jitaccel.method.pool import PooledPlan, make_pooled_plan
from jitaccel.method.run import Run
from jitaccel.patches.flux.flops import flux_flops

from ..flux.arguments import grid_of_ids
from ..flux.kinds import FLUX
from ..flux.packed import Conditions, Pack, run_packed
from ..flux.unpackable import reasons_unpackable
from ..foreign import Arguments
from ..network import ModelCall, answered
from .batch import levels_of
from .decoding import decode_tokens
from .hook import hook_of
from .pipelines import check_text_to_image
from .scheduler import SchedulerRoute
from .warm import generate_once
from .wrapped import scheduler_handle

if TYPE_CHECKING:
    from diffusers import FluxPipeline, FluxTransformer2DModel

_ARGUMENTS = (
    "hidden_states",
    "encoder_hidden_states",
    "pooled_projections",
    "timestep",
    "img_ids",
    "txt_ids",
    "guidance",
)


class FluxStage(nn.Module):
    """One stage of a FLUX transformer as a function of tensors, for images of one size and prompts of one length.

    Position ids and token counts are constants of the stage. Anchors are an argument. A stage that pools the picture
    has no anchors (`PooledFluxStage`).
    """

    def __init__(
        self,
        model: FluxTransformer2DModel,
        config: JiTConfig,
        grid: tuple[int, int],
        layout: PackedLayout,
        attention: Backend,
    ) -> None:
        super().__init__()
        self.model = model
        self._config, self._grid, self._layout, self._attention = config, grid, layout, attention
        device = layout.order.device
        rows, columns = torch.meshgrid(*(torch.arange(size, device=device) for size in grid), indexing="ij")
        self._image_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()
        self._text_ids = torch.zeros(sum(layout.text.lengths), 3, dtype=torch.float32, device=device)

    def forward(
        self,
        state: Tensor,
        anchors: Tensor,
        nearest: Tensor,
        blur: Tensor,
        text: Tensor,
        pooled: Tensor,
        guidance: Tensor,
        levels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        plan = LiftPlan(grid=self._grid, anchors=anchors, nearest=nearest, weights=blur)
        return self._step(plan, state, text, pooled, guidance, levels)

    def _step(
        self,
        plan: LiftPlan | PooledPlan,
        state: Tensor,
        text: Tensor,
        pooled: Tensor,
        guidance: Tensor,
        levels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        batch = state.shape[0]
        ids = self._image_ids.repeat(batch, 1) if plan.is_dense else self._image_ids[plan.positions.flatten()]
        rotary = self.model.pos_embed(self._layout.join(self._text_ids, ids))
        given = Conditions(
            text=text.flatten(0, 1),
            pooled=pooled,
            # Rounded as in a pipeline, which passes a timestep from 0 to 1000 in the model's dtype.
            level=((1000 * plan.show_level(levels[0])).to(state.dtype) / 1000).expand(batch),
            guidance=guidance if self.model.config.guidance_embeds else None,
        )
        pack = Pack(self._layout, rotary, hooked=False)
        shown = plan.show(state, levels[0])
        values = run_packed(self.model, pack, shown.flatten(0, 1), given, self._attention).unflatten(0, (batch, -1))
        velocity = plan.lift(values, state, levels[0], self._config.lifter, shown)
        moved = state.float() + (levels[1] - levels[0]) * velocity.float()
        return velocity, moved.to(state.dtype)


class PooledFluxStage(FluxStage):
    """A stage that shows the network a smaller picture, as a function of tensors."""

    def __init__(
        self,
        model: FluxTransformer2DModel,
        config: JiTConfig,
        grid: tuple[int, int],
        layout: PackedLayout,
        attention: Backend,
        factor: int,
    ) -> None:
        super().__init__(model, config, grid, layout, attention)
        self._plan = make_pooled_plan(len(layout.image.lengths), grid, factor, FLUX.patch, layout.order.device)

    def forward(  # type: ignore[override]
        self, state: Tensor, text: Tensor, pooled: Tensor, guidance: Tensor, levels: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._step(self._plan, state, text, pooled, guidance, levels)


def export(
    pipeline: FluxPipeline, config: JiTConfig, size: tuple[int, int], batch: int, text_tokens: int, attention: str
) -> Exportable:
    """Returns the stages of a pipeline's transformer for one size in pixels, batch and length of prompts."""
    check_text_to_image(pipeline)
    model, unit = pipeline.transformer, 2 * pipeline.vae_scale_factor
    if hook_of(model) is not None:
        raise ConfigError("export: target must not be patched, got a patched pipeline; remove() its handle first")
    if reasons := reasons_unpackable(model):
        raise UnsupportedModelError(f"export: the transformer must be diffusers' own, got: {'; '.join(reasons)}")
    if len(size) != 2 or any(
        not isinstance(side, int) or not unit <= side <= MOST_SIDE or side % unit for side in size
    ):
        raise ConfigError(
            f"export: size must be (height, width) in multiples of {unit} pixels, {MOST_SIDE} at most, got {size!r}; "
            f"round it"
        )
    if config.steps == "caller":
        raise ConfigError("export: steps must be a number, got the caller's number, which is not known; give steps=")
    grid = (size[0] // unit, size[1] // unit)
    num_tokens, device = grid[0] * grid[1], model.device
    backend = choose_backend(attention, device, model.dtype, model.config.attention_head_dim)
    stages: list[tuple[nn.Module, dict[str, Tensor]]] = []
    for index, count in enumerate(config.stage_tokens(grid)):
        layout = PackedLayout.of([text_tokens] * batch, [count] * batch, device)
        given, factor = _arguments(model, grid, batch, text_tokens), config.pooling_of(index)
        if factor > 1:
            stages.append((PooledFluxStage(model, config, grid, layout, backend, factor).eval(), given))
        else:
            stage = FluxStage(model, config, grid, layout, backend).eval()
            stages.append((stage, _with_anchors(given, config, grid, count)))
    return Exportable(
        codebase="FluxPipeline",
        stages=stages,
        levels=levels_of(pipeline, config, num_tokens),
        grid=grid,
        model=dict(model.config),
        device=device,
        dtype=model.dtype,
    )


def _arguments(model: FluxTransformer2DModel, grid: tuple[int, int], batch: int, text_tokens: int) -> dict[str, Tensor]:
    """Returns the arguments, by name and in order, with which a pooled stage is traced."""
    settings, generator = model.config, torch.Generator("cpu").manual_seed(0)
    shapes = (
        (batch, grid[0] * grid[1], settings.in_channels),
        (batch, text_tokens, settings.joint_attention_dim),
        (batch, settings.pooled_projection_dim),
    )
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes)
    state, text, pooled = (x.to(model.device, model.dtype) for x in drawn)
    guidance = torch.full((batch,), 3.5, dtype=torch.float32, device=model.device)
    levels = torch.tensor([0.9, 0.8], dtype=torch.float32, device=model.device)
    return {"state": state, "text": text, "pooled": pooled, "guidance": guidance, "levels": levels}


def _with_anchors(
    arguments: dict[str, Tensor], config: JiTConfig, grid: tuple[int, int], count: int
) -> dict[str, Tensor]:
    """Returns the arguments of a stage that does not pool, with the anchors and their lift after the state."""
    state, generator = arguments["state"], torch.Generator("cpu").manual_seed(0)
    anchors = torch.stack([first_anchors(grid, count, generator)] * len(state)).to(state.device)
    plan = make_lift_plan(anchors, grid, config.blur_scale)
    lift = {"anchors": anchors, "nearest": plan.nearest, "blur": plan.weights}
    return {"state": state, **lift, **{name: value for name, value in arguments.items() if name != "state"}}


def prepare_exported(pipeline: FluxPipeline, exported: Exported) -> Installation:
    """Returns the installation with which a `FluxPipeline` runs exported stages instead of its transformer."""
    check_text_to_image(pipeline, has_transformer=False)
    model = pipeline.transformer
    if scheduler_handle(pipeline.scheduler) is not None or (model is not None and hook_of(model) is not None):
        raise ConfigError("Exported.apply: pipeline must not be patched, got a patched one; remove() its handle first")
    stand_in = _StandIn(exported)
    calls = _Calls(exported)
    route = SchedulerRoute(pipeline, exported.manifest.config, "exported FluxPipeline", calls, transformer=stand_in)
    stand_in.route = route

    def put(pipeline: FluxPipeline, handle: Handle) -> None:
        handle.set_attribute(pipeline, "transformer", stand_in)
        route.install(handle)

    return Installation(
        route=route, install=put, check_idle=route.check_idle, generate=generate_once, decode=decode_tokens
    )


class _Calls:
    """Statistics of exported stages."""

    execution = "exported"
    compiled = None
    notes: tuple[str, ...] = ()

    def __init__(self, exported: Exported) -> None:
        self.attention: str | None = f"{exported.manifest.attention}, {exported.manifest.format}"

    def release(self) -> None:
        """Does nothing, because the stages belong to the caller."""


class _StandIn(nn.Module):
    """Takes the place of a `FluxPipeline`'s transformer: checks a call against the manifest and runs its stage."""

    route: SchedulerRoute[_Calls]

    def __init__(self, exported: Exported) -> None:
        super().__init__()
        self.config = FrozenDict(exported.manifest.model)
        self._exported = exported

    @property
    def device(self) -> torch.device:
        return self._exported.device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self._exported.manifest.dtype)
        return dtype

    def cache_context(self, name: str) -> AbstractContextManager[None]:
        """Returns a context without effect, because stages keep nothing between calls."""
        return nullcontext()

    def forward(self, *, return_dict: bool = True, **arguments: Any) -> Any:
        velocity = answered(self.route, lambda: self.route.forward(self._call(arguments)), _no_model)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def _call(self, arguments: Arguments) -> ModelCall:
        extra = sorted(name for name, value in arguments.items() if name not in _ARGUMENTS and value not in (None, {}))
        if extra:
            raise UnsupportedModelError(
                f"jitaccel: calls of exported stages must have {', '.join(_ARGUMENTS)} only, got {', '.join(extra)} "
                f"too; use the model itself for this call"
            )
        state, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
        self._exported.manifest.check_call(
            batch=state.shape[0],
            text_tokens=text.shape[1],
            channels=state.shape[2],
            dtype=str(state.dtype).removeprefix("torch."),
            device=state.device.type,
        )
        return ModelCall(
            state=state,
            text_tokens=text.shape[1],
            cost=functools.partial(flux_flops, self.config),
            patch=FLUX.patch,
            grid=functools.partial(self._grid, arguments["img_ids"], state.shape[1]),
            noise_level=lambda: float(arguments["timestep"].flatten()[0]),
            evaluate=functools.partial(self._evaluate, arguments),
        )

    def _grid(self, img_ids: Tensor, num_tokens: int) -> tuple[int, int]:
        grid = grid_of_ids(img_ids, num_tokens)
        self._exported.manifest.check_call(grid=grid)
        return grid

    def _evaluate(self, arguments: Arguments, run: Run, state: Tensor) -> Answer:
        batch, plan = state.shape[0], run.plan
        guidance = arguments.get("guidance")
        no_guidance = torch.zeros(1, dtype=torch.float32, device=state.device)
        lift = (plan.anchors, plan.nearest, plan.weights) if isinstance(plan, LiftPlan) else ()
        velocity, _ = self._exported.run(
            run.stage,
            state.contiguous(),
            *lift,
            _each(arguments["encoder_hidden_states"], batch),
            _each(arguments["pooled_projections"], batch),
            _each(no_guidance if guidance is None else guidance.float(), batch),
            # The scheduler takes the step, so no next level is needed; the call's own timestep may be rounded.
            torch.full((2,), run.noise_level, dtype=torch.float32, device=state.device),
        )
        return Answer(run.gather(velocity), velocity)


def _no_model() -> Tensor:
    raise AssertionError("exported stages never fall back to dense, because there is no model to run")


def _each(x: Tensor, batch: int) -> Tensor:
    """Returns one row for each image, contiguous."""
    return x.expand(batch, *x.shape[1:]).contiguous()
