"""Private names of torch and of diffusers are each used in one file only; those of torch behave as documented."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jitaccel.execution import private

ROOT = Path(__file__).resolve().parents[2]
# Each list of names, and the one file that may hold them.
NAMES = {
    "jitaccel/execution/private.py": (
        r"\btorch(\.\w+)*\._(?!_)|_orig_mod|_compiled_call_impl|\._forward_(pre_)?hooks|\._modules|__tensor_flatten__"
    ),
    "patches/diffusers_private.py": (
        r"\b(_diffusers_hook|_hf_hook|_attention_backend|_parallel_config|_flattened_mesh|_all_hooks|_execution_device|"
        r"_(un)?pack_latents|_step_index|_begin_index|_resolve_dtype)\b"
    ),
}


@pytest.mark.parametrize("home", NAMES)
def test_private_names_of_another_package_are_in_one_file(home: str) -> None:
    files = [*(ROOT / "jitaccel").rglob("*.py"), *(ROOT / "patches").rglob("*.py")]
    found = {
        str(path.relative_to(ROOT))
        for path in files
        for line in path.read_text().splitlines()
        if re.search(NAMES[home], line.partition("#")[0])
    }
    assert {name for name in found if not name.startswith(("jitaccel/patches/", "jitaccel/benchmarks/"))} == {home}


def test_options_of_inductor_are_listed() -> None:
    assert "triton.cudagraphs" in private.inductor_options()
    assert private.inductor_options_of_mode("max-autotune")["max_autotune"] is True


def test_backends_are_found_by_name() -> None:
    assert callable(private.backend_named("eager"))


def test_forgotten_graphs_are_compiled_again() -> None:
    graphs = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def double(x: Tensor) -> Tensor:
        return 2 * x

    run = torch.compile(double, backend=backend)
    run(torch.ones(2))
    run(torch.ones(2))
    assert len(graphs) == 1
    private.forget_graphs(double.__code__)
    run(torch.ones(2))
    assert len(graphs) == 2


def test_modules_say_whether_they_are_compiled_or_hooked() -> None:
    model = nn.Linear(2, 2)
    wrapped = torch.compile(model)
    assert private.is_compile_wrapper(wrapped) and not private.is_compile_wrapper(model)
    assert private.uncompiled(wrapped) is model and private.uncompiled(model) is model
    assert not private.is_compiled_in_place(model) and not private.has_forward_hooks(model)
    model.compile()
    model.register_forward_hook(lambda *_: None)
    assert private.is_compiled_in_place(model) and private.has_forward_hooks(model)


def test_children_can_be_put_in_another_order() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    private.children_of(model)["0"] = private.children_of(model).pop("0")
    assert [name for name, _ in model.named_children()] == ["1", "0"]


def test_plain_tensors_have_no_inner_ones() -> None:
    assert private.inner_tensors(torch.ones(2)) is None
