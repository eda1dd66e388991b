"""The cut: a transformer's own forward, with its blocks on the anchors alone.

Forward hooks on two to four submodules of one instance. The outputs of what makes tokens (a patch embedding) and of
what knows their positions (rotary embeddings) are cut to the anchors. The output of the last projection is put back in
place among zeros, so that the model's own unpatchify sees the shapes that it expects. Everything in between is the
model's: masks, text, LoRA, offloading, compiled blocks.

Indices are tensors that are made once a stage, and shapes depend on their number alone: a stage is one static graph.
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
    """Which of N generated tokens enter the network, as indices that one stage shares; made by `places_of`.

    Attributes:
        anchors: (B, M) int64, the anchors of each image.
        num_tokens: N.
        shared: (M,) int64, the anchors of every image where all have the same; else None.
        rows: (B * M,) int64, the anchors' rows in tokens (B * N, ...).
        kept: What one way leaves for a later one of the same forward, by name.
    """

    anchors: Tensor
    num_tokens: int
    shared: Tensor | None
    rows: Tensor
    kept: dict[str, Any] = field(default_factory=dict)

    def take(self, x: Tensor, dim: int, before: int = 0) -> Tensor:
        """Returns the anchors' entries of `x`, and the entries before and after those of the N tokens as they are.

        Args:
            x: Its axis `dim` holds `before` entries, the N tokens, and any number of others. With a batch in front
                (`dim` above 0), a row for each image, or one for all of them.
            dim: The axis of the tokens.
            before: How many entries come before the tokens.

        Raises:
            ValueError: For an axis that is too short, a batch of another size, or one table of places (`dim` 0) for
                images whose anchors differ.
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
        if taken.shape[0] != x.shape[0] and dim > 0:  # one row for all images has become a row for each
            parts = (parts[0].expand(len(taken), *x.shape[1:]), taken, parts[2].expand(len(taken), *x.shape[1:]))
        return torch.cat([part for part in parts if part.shape[dim]], dim=dim)

    def _taken(self, x: Tensor, dim: int) -> Tensor:
        if self.shared is not None:
            return x.index_select(dim, self.shared)
        if dim == 0:
            raise ValueError(
                "Places.take: images must have the same anchors where they share one table of places, got others for "
                "each; call the model image by image"
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
        """Returns `x` (B, M + R, ...) with its first M entries in place among zeros, (B, N + R, ...).

        Raises:
            ValueError: For fewer than M entries.
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
    """Returns the indices of a stage; made once, since they are tensors that a graph may hold.

    Args:
        anchors: (B, M) int64, of each image; with guidance in one batch, of each of its rows.
        num_tokens: N, of the whole grid.
        are_shared: Whether all images have the same anchors; None looks, which waits for the device.
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
"""How something that holds every token is cut to the anchors, or put back: (what there is, places) -> the same, cut."""


def rows(dim: int = 1, before: int = 0) -> Way:
    """Returns the way for a tensor that holds the tokens along `dim` after `before` others, or a tuple of such."""

    def cut(x: Any, places: Places) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)(cut(each, places) for each in x)
        return places.take(x, dim, before)

    return cut


def part(index: int, way: Way) -> Way:
    """Returns the way for a tuple of which one entry holds the tokens."""

    def cut(x: Any, places: Places) -> Any:
        return tuple(way(each, places) if k == index else each for k, each in enumerate(x))

    return cut


def volume(x: Tensor, places: Places) -> Tensor:
    """Returns the tokens (B, D, M) of what a convolution made, (B, D, T, H, W) or (B, D, H, W)."""
    return places.take(x.flatten(2).transpose(1, 2), 1).transpose(1, 2)


def each_token(x: Tensor, places: Places) -> Tensor:
    """Returns an argument (B, M) that may be given for every token, (B, N); another shape stays: (B,), (B, 1)."""
    return places.take(x, 1) if x.ndim > 1 and x.shape[1] == places.num_tokens else x


def put(x: Tensor, places: Places) -> Tensor:
    """Returns what a model makes of the anchors, (B, M + R, D), in place among zeros, (B, N + R, D)."""
    return places.put(x)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Where in a transformer its tokens can be cut.

    Attributes:
        outputs: Submodules, by dotted names, and how their output is changed.
        arguments: The same of arguments of the model that may hold every token.
        blocks: The same of arguments of repeated blocks, by the name of their list.
        methods: The same of what methods of the model return, where tokens are made outside any submodule.
        has_one_table: Whether one table of places serves all images, so that one forward cannot have other anchors for
            each image.
        rows: Arguments with a row for each image; needed with `has_one_table`.
        lists: Arguments that are lists of such.
    """

    outputs: Mapping[str, Way]
    arguments: Mapping[str, Way] = field(default_factory=dict)
    blocks: Mapping[str, Mapping[str, Way]] = field(default_factory=dict)
    methods: Mapping[str, Way] = field(default_factory=dict)
    has_one_table: bool = False
    rows: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()


def problems_of(model: nn.Module, adapter: Adapter) -> list[str]:
    """Returns why an adapter does not fit a model: every submodule that it lacks."""
    known = dict(model.named_modules())
    missing = [name for name in (*adapter.outputs, *adapter.blocks) if name not in known]
    found = [f"transformer must have a submodule {name!r}, got none in {type(model).__name__}" for name in missing]
    return found + [
        f"transformer must have a method {name!r}, got none in {type(model).__name__}"
        for name in adapter.methods
        if not callable(getattr(model, name, None))
    ]


class _Now:
    """The places of the forward under way, or None: all tokens enter. Hooks share it, and it holds no module."""

    def __init__(self) -> None:
        self.places: Places | None = None


class _Hook(Uncopied):
    """A forward hook; `way` changes the output."""

    def __init__(self, now: _Now, way: Way) -> None:
        self._now, self._way = now, way

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        places = self._now.places
        return None if places is None else self._way(output, places)


class _Method(Uncopied):
    """A method of an instance; `way` changes what the class's returns."""

    def __init__(self, now: _Now, way: Way, model: nn.Module, name: str) -> None:
        self._now, self._way, self._model, self._name = now, way, weakref.ref(model), name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, places = self._model(), self._now.places
        output = getattr(type(model), self._name)(model, *args, **kwargs)
        return output if places is None else self._way(output, places)


class _CutFirst(Uncopied):
    """Stands before a hook that divides a module's output among ranks: the output is cut, then divided."""

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
    """A hook before a block's forward; `ways` change keyword arguments by name."""

    def __init__(self, now: _Now, ways: Mapping[str, Way]) -> None:
        self._now, self._ways = now, ways

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        places = self._now.places
        return None if places is None else (args, cut_arguments(kwargs, self._ways, places))


def cut_arguments(arguments: Mapping[str, Any], ways: Mapping[str, Way], places: Places) -> dict[str, Any]:
    """Returns the arguments of a call, those that hold every token cut to the anchors."""
    return {
        name: ways[name](value, places) if name in ways and value is not None else value
        for name, value in arguments.items()
    }


class Cut:
    """The hooks on one model, which change nothing but within `at`.

    The model is held weakly. Hooks follow a submodule that was replaced, as by LoRA.

    Args:
        model: The transformer.
        adapter: Where its tokens pass.

    Raises:
        UnsupportedModelError: With every reason why the adapter does not fit the model.
    """

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        if problems := problems_of(model, adapter):
            raise UnsupportedModelError(
                f"Cut: {type(model).__name__} cannot be cut: {'; '.join(problems)}; use the model's own class, whole"
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
        """Puts the hooks where they belong now; those that are there stay."""
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
        """Takes every hook away; harmless where there is none."""
        model = self._model()
        for name, method in self._methods.items():
            if model is not None and vars(model).get(name) is method:
                del vars(model)[name]
        while self._placed:
            self._placed[-1][1].remove()
            self._placed.pop()

    def check(self) -> None:
        """Raises ConfigError for a model whose tokens were divided among ranks after it was cut."""
        model = self._model()
        if model is not None:
            check_still(model, was_parallel=self._was_parallel)

    @contextmanager
    def at(self, places: Places | None) -> Iterator[None]:
        """Cuts what runs inside to the anchors of `places`; None cuts nothing."""
        self.check()
        self.install()
        before, self._now.places = self._now.places, places
        try:
            yield
        finally:
            self._now.places = before

    def arguments(self, arguments: Mapping[str, Any], places: Places) -> dict[str, Any]:
        """Returns the arguments of a call of the model, those that hold every token cut to the anchors."""
        return cut_arguments(arguments, self._adapter.arguments, places)
