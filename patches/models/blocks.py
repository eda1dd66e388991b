"""Compiles the blocks of a transformer whose whole forward cannot be traced, because it reads values or makes lists."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from jitaccel.execution.compile import Compiler


@contextmanager
def compiled_blocks(model: nn.Module, lists: Sequence[str], compiler: Compiler) -> Iterator[None]:
    """Runs the blocks of a model compiled within this context. Blocks of a class share one graph per set of shapes.

    Args:
        model: The transformer.
        lists: The names of its lists of blocks.
        compiler: Holds the graphs.
    """
    with ExitStack() as undo:
        for name in lists:
            for block in model.get_submodule(name).children():
                undo.callback(_restore, block, vars(block).get("forward"))
                block.forward = functools.partial(_run, compiler, type(block), block.forward)
        yield


def _restore(block: nn.Module, forward: Any) -> None:
    if forward is None:
        vars(block).pop("forward", None)
    else:
        vars(block)["forward"] = forward


def _run(compiler: Compiler, kind: type, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return compiler.run((kind, _shapes(args), _shapes(kwargs)), _call, forward, args, kwargs)


def _call(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)


def _shapes(value: Any) -> Hashable:
    """Returns the key of a graph: shapes and dtypes of all tensors in nested containers, and all other values."""
    if isinstance(value, Tensor):
        return (value.shape, value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(_shapes(each) for each in value)
    if isinstance(value, dict):
        return tuple((name, _shapes(each)) for name, each in sorted(value.items()))
    return repr(value)
