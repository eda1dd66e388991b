"""The cut: runs a transformer's own forward with its blocks on the anchors only.

It consists of forward hooks on two to four submodules of one instance. Hooks cut two outputs to the anchors: the tokens
(from a patch embedding) and their positions (from rotary embeddings). Another hook scatters the output of the last
projection back among zeros, so that the model's own unpatchify sees the shapes it expects. Everything in between is the
model's: masks, text, LoRA, offloading, compiled blocks.

The indices are tensors that are computed once per stage. Shapes depend only on the number of anchors, so a stage is one
static graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from jitaccel.errors import UnsupportedModelError
from jitaccel.generation.handle import Uncopied

from .diffusers_private import divides_output, is_parallel
from .ranks import check_still


@dataclass(frozen=True, eq=False)
class Places:
    """Indices of the tokens that enter the network, out of N generated ones. `places_of` makes them once per stage.

    Attributes:
        anchors: (B, M) int64, the anchors of each image.
        num_tokens: N.
        shared: (M,) int64, the anchors of every image if all images have the same; otherwise None.
        rows: (B * M,) int64, the anchors' rows in tokens (B * N, ...).
        kept: Values that one way stores for a later way in the same forward, by name.
    """

    anchors: Tensor
    num_tokens: int
    shared: Tensor | None
    rows: Tensor
    kept: dict[str, Any] = field(default_factory=dict)

    def take(self, x: Tensor, dim: int, before: int = 0) -> Tensor:
        """Returns `x` with only the anchors left of its N tokens; entries before and after the tokens stay.

        Args:
            x: Its axis `dim` holds `before` entries, then the N tokens, then any number of others. If a batch axis
                comes first (`dim` above 0), it has one row for each image, or a single row for all images.
            dim: The axis of the tokens.
            before: Number of entries before the tokens.

        Raises:
            ValueError: If the axis is too short, the batch size does not fit, or images with different anchors share
                one table of positions (`dim` 0).
        """
        after = x.shape[dim] - before - self.num_tokens
        if after < 0 or before < 0:
            raise ValueError(
                f"Places.take: x must have {before} and {self.num_tokens} entries along axis {dim}, got shape "
                f"{tuple(x.shape)}; the grid of the call does not fit the model"
            )
        taken = self._taken(x.narrow(dim, before, self.num_tokens), dim)
        parts = (x.narrow(dim, 0, before), taken, x.narrow(dim, before + self.num_tokens, after))
        if before + after == 0:
            return taken
        if taken.shape[0] != x.shape[0] and dim > 0:  # the single row for all images has become one row per image
            parts = (parts[0].expand(len(taken), *x.shape[1:]), taken, parts[2].expand(len(taken), *x.shape[1:]))
        return torch.cat([part for part in parts if part.shape[dim]], dim=dim)

    def _taken(self, x: Tensor, dim: int) -> Tensor:
        if self.shared is not None:
            return x.index_select(dim, self.shared)
        if dim == 0:
            raise ValueError(
                "Places.take: images that share one table of positions must have the same anchors, got different ones; "
                "call the model image by image"
            )
        batch, count = self.anchors.shape
        x = x.movedim(dim, 1)
        if x.shape[0] == 1:
            taken = x[0].index_select(0, self.anchors.flatten())
        elif x.shape[0] == batch:
            taken = x.flatten(0, 1).index_select(0, self.rows)
        else:
            raise ValueError(
                f"Places.take: x must have a row for each of {batch} images, or one, got {x.shape[0]}; "
                f"repeat the anchors for branches of guidance"
            )
        return taken.view(batch, count, *x.shape[2:]).movedim(1, dim)

    def put(self, x: Tensor) -> Tensor:
        """Returns `x` (B, M + R, ...) with its first M entries scattered among zeros, (B, N + R, ...).

        Raises:
            ValueError: If `x` has fewer than M entries.
        """
        batch, count = x.shape[0], self.anchors.shape[1]
        if x.shape[1] < count:
            raise ValueError(
                f"Places.put: x must have {count} anchors along axis 1, got shape {tuple(x.shape)}; "
                f"the model drops tokens itself"
            )
        values, after = x[:, :count], x[:, count:]
        whole = x.new_zeros(batch, self.num_tokens, *x.shape[2:])
        if self.shared is not None:
            whole = whole.index_copy(1, self.shared, values)
        else:
            whole = whole.flatten(0, 1).index_copy(0, self.rows, values.flatten(0, 1)).view_as(whole)
        return torch.cat([whole, after], dim=1) if after.shape[1] else whole


def places_of(anchors: Tensor, num_tokens: int, *, are_shared: bool | None = None) -> Places:
    """Returns the indices of a stage. Call it once per stage, because a graph may hold these tensors.

    Args:
        anchors: (B, M) int64, the anchors of each image, or of each row of a batch that contains guidance branches.
        num_tokens: N, the number of tokens in the whole grid.
        are_shared: Whether all images have the same anchors. None compares them, which waits for the device.
    """
    if are_shared is None:
        are_shared = bool((anchors == anchors[:1]).all())
    starts = torch.arange(len(anchors), device=anchors.device) * num_tokens
    return Places(
        anchors=anchors,
        num_tokens=num_tokens,
        shared=anchors[0].contiguous() if are_shared else None,
        rows=(anchors + starts[:, None]).flatten(),
    )


Way = Callable[[Any, Places], Any]
"""Cuts a value that holds every token to the anchors, or scatters it back: (value, places) -> changed value."""


def rows(dim: int = 1, before: int = 0) -> Way:
    """Returns the way for a tensor, or a tuple of tensors, with the tokens along `dim` after `before` other entries."""

    def cut(x: Any, places: Places) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)(cut(each, places) for each in x)
        return places.take(x, dim, before)

    return cut


def part(index: int, way: Way) -> Way:
    """Returns the way for a tuple whose entry `index` holds the tokens."""

    def cut(x: Any, places: Places) -> Any:
        return tuple(way(each, places) if k == index else each for k, each in enumerate(x))

    return cut


def volume(x: Tensor, places: Places) -> Tensor:
    """Returns the anchors (B, D, M) of a convolution's output, (B, D, T, H, W) or (B, D, H, W)."""
    return places.take(x.flatten(2).transpose(1, 2), 1).transpose(1, 2)


def each_token(x: Tensor, places: Places) -> Tensor:
    """Cuts an argument with a value for every token, (B, N), to (B, M); other shapes, such as (B,), stay unchanged."""
    return places.take(x, 1) if x.ndim > 1 and x.shape[1] == places.num_tokens else x


def put(x: Tensor, places: Places) -> Tensor:
    """Returns a model's output for the anchors, (B, M + R, D), scattered among zeros, (B, N + R, D)."""
    return places.put(x)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The places in a transformer where its tokens can be cut.

    Attributes:
        outputs: The way for the output of each submodule, by dotted name.
        arguments: The way for each argument of the model that may hold every token.
        blocks: The ways for arguments of repeated blocks, by the name of the block list.
        methods: The way for the return value of each model method that makes tokens outside any submodule.
        has_one_table: Whether all images share one table of positions, in which case one forward cannot have different
            anchors for each image.
        rows: Arguments with one row for each image; needed with `has_one_table`.
        lists: Arguments that are lists of such arguments.
    """

    outputs: Mapping[str, Way]
    arguments: Mapping[str, Way] = field(default_factory=dict)
    blocks: Mapping[str, Mapping[str, Way]] = field(default_factory=dict)
    methods: Mapping[str, Way] = field(default_factory=dict)
    has_one_table: bool = False
    rows: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()


def problems_of(model: nn.Module, adapter: Adapter) -> list[str]:
    """Returns why an adapter does not fit a model: every submodule and method that the model lacks."""
    known = dict(model.named_modules())
    missing = [name for name in (*adapter.outputs, *adapter.blocks) if name not in known]
    found = [f"transformer must have a submodule {name!r}, got none in {type(model).__name__}" for name in missing]
    return found + [
        f"transformer must have a method {name!r}, got none in {type(model).__name__}"
        for name in adapter.methods
        if not callable(getattr(model, name, None))
    ]


class _Now:
    """The places of the current forward; None if all tokens enter. Hooks share this object; it holds no module."""

    def __init__(self) -> None:
        self.places: Places | None = None


class _Hook(Uncopied):
    """A forward hook that changes the output with `way`."""

    def __init__(self, now: _Now, way: Way) -> None:
        self._now, self._way = now, way

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        places = self._now.places
        return None if places is None else self._way(output, places)


class _Method(Uncopied):
    """A method set on an instance that changes the result of the class's method with `way`."""

    def __init__(self, now: _Now, way: Way, model: nn.Module, name: str) -> None:
        self._now, self._way, self._model, self._name = now, way, weakref.ref(model), name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, places = self._model(), self._now.places
        output = getattr(type(model), self._name)(model, *args, **kwargs)
        return output if places is None else self._way(output, places)


class _CutFirst(Uncopied):
    """Wraps a hook that divides a module's output among ranks, so that the output is cut first and then divided."""

    def __init__(self, reference: Any, hook: _Hook) -> None:
        self._reference, self._hook, self._divide = reference, hook, reference.post_forward
        reference.post_forward = self

    def __call__(self, module: nn.Module, output: Any) -> Any:
        cut = self._hook(module, (), output)
        return self._divide(module, output if cut is None else cut)

    def remove(self) -> None:
        if self._reference.post_forward is self:
            self._reference.post_forward = self._divide


class _BlockHook(Uncopied):
    """A pre-forward hook on a block that changes keyword arguments with `ways`, by name."""

    def __init__(self, now: _Now, ways: Mapping[str, Way]) -> None:
        self._now, self._ways = now, ways

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        places = self._now.places
        return None if places is None else (args, cut_arguments(kwargs, self._ways, places))


def cut_arguments(arguments: Mapping[str, Any], ways: Mapping[str, Way], places: Places) -> dict[str, Any]:
    """Returns the arguments of a call, with those that hold every token cut to the anchors."""
    return {
        name: ways[name](value, places) if name in ways and value is not None else value
        for name, value in arguments.items()
    }


class Cut:
    """The hooks on one model. They change nothing outside `at`.

    The model is held weakly. If a submodule is replaced, for example by LoRA, the hooks move to the new one.

    Args:
        model: The transformer.
        adapter: Where its tokens can be cut.

    Raises:
        UnsupportedModelError: If the adapter does not fit the model; the message lists every reason.
    """

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        if problems := problems_of(model, adapter):
            raise UnsupportedModelError(
                f"Cut: {type(model).__name__} cannot be cut: {'; '.join(problems)}; use the model's original class, "
                f"with all its submodules"
            )
        self._model = weakref.ref(model)
        self._adapter = adapter
        self._now = _Now()
        self._outputs = {name: _Hook(self._now, way) for name, way in adapter.outputs.items()}
        self._blocks = {name: _BlockHook(self._now, ways) for name, ways in adapter.blocks.items()}
        self._methods = {name: _Method(self._now, way, model, name) for name, way in adapter.methods.items()}
        self._was_parallel = is_parallel(model)
        self._placed: list[tuple[weakref.ref[nn.Module], RemovableHandle | _CutFirst]] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The submodules and methods that carry hooks."""
        return (*self._outputs, *self._blocks, *self._methods)

    def install(self) -> None:
        """Installs missing hooks on the current submodules; hooks already in place stay."""
        model = self._model()
        if model is None:
            return
        outputs = [(model.get_submodule(name), hook) for name, hook in self._outputs.items()]
        blocks = [
            (block, hook) for name, hook in self._blocks.items() for block in model.get_submodule(name).children()
        ]
        wanted = [module for module, _ in (*outputs, *blocks)]
        vars(model).update(self._methods)
        if len(wanted) == len(self._placed) and all(
            place() is module for (place, _), module in zip(self._placed, wanted, strict=True)
        ):
            return
        self.remove()
        vars(model).update(self._methods)
        for module, hook in outputs:
            reference = divides_output(module)
            placed = module.register_forward_hook(hook) if reference is None else _CutFirst(reference, hook)
            self._placed.append((weakref.ref(module), placed))
        for module, before in blocks:
            self._placed.append((weakref.ref(module), module.register_forward_pre_hook(before, with_kwargs=True)))

    def remove(self) -> None:
        """Removes every hook; harmless if there are none."""
        model = self._model()
        for name, method in self._methods.items():
            if model is not None and vars(model).get(name) is method:
                del vars(model)[name]
        while self._placed:
            self._placed[-1][1].remove()
            self._placed.pop()

    def check(self) -> None:
        """Raises ConfigError if the model's tokens were divided among ranks after it was cut."""
        model = self._model()
        if model is not None:
            check_still(model, was_parallel=self._was_parallel)

    @contextmanager
    def at(self, places: Places | None) -> Iterator[None]:
        """Within this context the model runs on the anchors of `places`; None cuts nothing."""
        self.check()
        self.install()
        before, self._now.places = self._now.places, places
        try:
            yield
        finally:
            self._now.places = before

    def arguments(self, arguments: Mapping[str, Any], places: Places) -> dict[str, Any]:
        """Returns the arguments of a call of the model, with those that hold every token cut to the anchors."""
        return cut_arguments(arguments, self._adapter.arguments, places)
