"""Runs a model's own forward on the anchors, with tokens, position ids, masks and residuals cut to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jitaccel.method.run import Run

from ..foreign import Arguments, Forward
from ..split import Split
from .arguments import one_image, shown_timestep
from .kinds import Kind


def run_indexed(
    kind: Kind, original: Forward, arguments: Arguments, split: Split, run: Run, state: Tensor
) -> Tensor:
    """Returns the velocity (B, M, D) at a run's anchors of a state (B, N, D); image by image if anchors differ."""
    calls = calls_at_anchors(kind, arguments, split, run, state)
    velocities = [original(**{**own, **_with_axes(kind, own), "return_dict": False})[0] for own in calls]
    velocity = velocities[0] if len(velocities) == 1 else torch.cat(velocities)
    return velocity[:, : run.num_active] if split.num_references else velocity


def _with_axes(kind: Kind, arguments: Arguments) -> dict[str, Any]:
    """Returns position ids with the number of axes expected by the hooks that divide them among ranks."""
    ids = {name: arguments[name] for name in ("img_ids", "txt_ids")}
    return {name: x[None] if x.ndim < kind.ids_ndim else x for name, x in ids.items()}


def calls_at_anchors(
    kind: Kind, arguments: Arguments, split: Split, run: Run, state: Tensor
) -> list[dict[str, Any]]:
    """Returns the arguments of the forwards that compute a run's anchors of a state (B, N, D).

    It is one forward, or one for each image if their anchors differ.
    """
    ids = one_image(arguments["img_ids"])
    tokens = {"hidden_states": split.tokens(run, state)}
    if run.is_dense:
        return [{**arguments, **tokens}]
    changed = {**arguments, **tokens, **_at_anchors(kind, arguments, split, run)}
    positions = run.plan.positions
    if run.has_shared_anchors:
        return [{**changed, "img_ids": split.ids_at(ids, positions[0])}]
    return [
        {**changed, **_of_image(kind, changed, image), "img_ids": split.ids_at(ids, positions[image])}
        for image in range(state.shape[0])
    ]


def _at_anchors(kind: Kind, arguments: Arguments, split: Split, run: Run) -> dict[str, Any]:
    """Returns the arguments that hold every token, cut to those that enter the network."""
    batch, text_tokens = run.anchors.shape[0], arguments["encoder_hidden_states"].shape[1]
    found: dict[str, Any] = {"timestep": shown_timestep(run, arguments["timestep"])}
    for name in kind.masks:
        if arguments.get(name) is not None:
            found[name] = split.entering(run.gather, _expand(arguments[name], batch), before=text_tokens)
    for name in kind.tokens:
        found[name] = split.entering(run.show_beside, _expand(arguments[name], batch))
    for name in kind.residuals:
        if arguments.get(name) is not None:
            residuals = (_expand(residual, batch) for residual in arguments[name])
            found[name] = [split.entering(run.show_features, residual) for residual in residuals]
    return found


def _of_image(kind: Kind, arguments: Arguments, image: int) -> dict[str, Any]:
    """Returns one image's rows of the arguments that have a row for each image."""
    present = ((name, arguments.get(name)) for name in ("hidden_states", *kind.per_image))
    # As in the model, a single row serves every image of a batch.
    rows: dict[str, Any] = {name: _row(value, image) for name, value in present if value is not None}
    for name in kind.residuals:
        if arguments.get(name) is not None:
            rows[name] = [_row(residual, image) for residual in arguments[name]]
    extra = arguments.get("joint_attention_kwargs") or {}
    if "ip_adapter_image_embeds" in extra:
        embeds = [_row(adapter, image) for adapter in extra["ip_adapter_image_embeds"]]
        rows["joint_attention_kwargs"] = {**extra, "ip_adapter_image_embeds": embeds}
    return rows


def _expand(x: Tensor, batch: int) -> Tensor:
    return x if x.shape[0] == batch else x.expand(batch, *x.shape[1:])


def _row(values: Tensor, image: int) -> Tensor:
    return values[image : image + 1] if values.shape[0] > 1 else values
