"""Random sequences of operations on a target: correct pictures while patched, the original bits once removed."""

from __future__ import annotations

import copy
import functools
import gc
import random
from typing import Any

import torch

import jitaccel
from jitaccel import ConfigError
from tests.campaigns.campaign import Counts, Survivor
from tests.campaigns.targets import CONFIGS, expected, registered
from tests.support.patched import CASES, picture_of

_LENGTH = 8


class _Broken(Exception):
    """Raised by a network that is made to fail."""


class _Session:
    """One target and its expected state. `config` is the applied configuration, or None."""

    def __init__(self, kind: str, rng: random.Random, counts: Counts) -> None:
        self.kind, self.case, self.rng, self.counts = kind, CASES[kind], rng, counts
        self.target = self.case.make()
        self.untouched = picture_of(self.target)
        self.config: str | None = None
        self.handles: list[jitaccel.Handle] = []
        self.done: list[str] = []

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            raise Survivor(f"{self.kind}: {what} after {', '.join(self.done)}")

    def apply(self) -> None:
        self.config = self.rng.choice([*CONFIGS])
        self.handles.append(jitaccel.apply(self.target, CONFIGS[self.config]))

    def apply_nonsense(self) -> None:
        self.counts.faults += 1
        try:
            jitaccel.apply(self.target, "7x", densities=(0.9, 0.1, 1.0))
        except ConfigError:
            return
        self.require(False, "a bad configuration was taken")

    def remove(self) -> None:
        if self.handles and self.rng.random() < 0.5:
            handle = self.rng.choice(self.handles)  # removing an older handle does not affect the last one
            is_last = handle is self.handles[-1]
            handle.remove()
            self.config = None if is_last else self.config
        else:
            found = jitaccel.remove(self.target)
            self.require(found == (self.config is not None), f"remove returned {found}")
            self.config = None

    def picture(self) -> None:
        seed = self.rng.randrange(2)
        made = self.case.generate(self.target, seed)
        self.require(torch.equal(made, expected(self.kind, self.config, seed)), f"a wrong picture ({self.config})")

    def broken_picture(self) -> None:
        """Makes the network raise in one of its calls, which must end the picture and nothing else."""
        self.counts.faults += 1
        network, left = self.rng.choice(self.case.parts(self.target)), [self.rng.randrange(6)]
        kind = self.rng.choice([_Broken, KeyboardInterrupt])

        def hook(*_: Any) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise kind

        inner = [module for module in network.modules() if not [*module.children()] and [*module.parameters()]]
        handle = self.rng.choice(inner).register_forward_hook(hook)
        try:
            self.case.generate(self.target, self.rng.randrange(2))
        except (_Broken, KeyboardInterrupt):
            pass
        finally:
            handle.remove()

    def replaced_forward(self) -> None:
        """Replaces the network's forward, which must be called or refused by name, and can be removed again."""
        network, calls = self.case.parts(self.target)[0], 0
        if "forward" in vars(network) or self.config is not None:
            return
        own = network.forward

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return own(*args, **kwargs)

        network.forward = forward
        try:
            with jitaccel.apply(self.target, CONFIGS["short"]):
                made = self.case.generate(self.target, 0)
            wanted = expected(self.kind, "short", 0)
            error = float((made - wanted).abs().max() / wanted.abs().max())
            self.require(calls > 0 or self.kind == "ComfyUI", "a replaced forward was not called")
            self.require(error < 1e-4, f"another picture ({error:g}) through a replaced forward")
        except jitaccel.UnsupportedModelError:
            pass
        finally:
            del network.forward

    def copied(self) -> None:
        part = self.rng.choice(self.case.parts(self.target))
        if self.kind == "ComfyUI":
            return  # the patcher is patched, and its clones inherit the patch
        try:
            copy.deepcopy(part)
        except TypeError as error:
            self.require(self.config is not None and "must not be patched" in str(error), f"no copy: {error}")
            return
        self.require(self.config is None, "a patched target was copied")

    def looked_at(self) -> None:
        handle = jitaccel.handle_of(self.target)
        self.require((handle is not None) == (self.config is not None), "handle_of is wrong")
        if handle is not None:
            repr(handle), str(handle.stats()), handle.reset()
        gc.collect()

    def end(self) -> None:
        jitaccel.remove(self.target)
        self.require(jitaccel.handle_of(self.target) is None, "a handle stays")
        self.config = None
        self.picture()
        after = {name: value for name, value in picture_of(self.target).items() if not name.startswith("0._")}
        before = {name: value for name, value in self.untouched.items() if not name.startswith("0._")}
        left = [name for name in {*after, *before} if after.get(name) != before.get(name) and is_ours(name)]
        self.require(not left, f"{left} stay")


def is_ours(name: str) -> bool:
    """Returns whether an attribute is not one that schedulers or pipelines themselves change in their calls."""
    word = name.partition(".")[2]
    return word in ("forward", "step", "set_timesteps", "wrappers") or "jitaccel" in word


def case(rng: random.Random, counts: Counts) -> None:
    """Runs some operations on one target."""
    with registered():
        session = _Session(rng.choice([*CASES]), rng, counts)
        names = ("apply", "apply", "picture", "picture", "remove", "broken_picture", "replaced_forward", "copied",
                 "looked_at", "apply_nonsense")  # fmt: skip
        for _ in range(_LENGTH):
            name = rng.choice(names)
            session.done.append(name)
            getattr(session, name)()
            counts.operations += 1
        session.end()
