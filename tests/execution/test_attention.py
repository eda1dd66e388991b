"""Attention of packed execution: every backend here against float64, how packages are called, what is chosen."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor

from jitaccel.errors import ConfigError
from jitaccel.execution.attention.backend import is_found
from jitaccel.execution.attention.choice import (
    ATTENTION,
    BACKENDS,
    Backend,
    check_attention,
    choose_backend,
    varlen_attention,
)
from jitaccel.execution.packing import PackedLayout

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
NAMES = [backend.name for backend in BACKENDS]
OF_CUDA = [name for name in NAMES if name != "sdpa"]
LAYOUTS = {  # text lengths, image lengths
    "one": ((7,), (30,)),
    "a token each": ((1, 0, 0), (0, 1, 1)),
    "uneven": ((5, 1, 30, 0), (40, 129, 1, 64)),
    "equal": ((8,) * 9, (24,) * 9),
    "equal in sum": ((8, 4, 0), (24, 28, 32)),
    "no text": ((0, 0), (33, 48)),
}


def layout_of(name: str, device: torch.device = CPU) -> PackedLayout:
    text, image = LAYOUTS[name]
    return PackedLayout.of(text, image, device)


@pytest.fixture(autouse=True)
def _chosen_anew() -> Iterator[None]:
    """Machines are faked below, so nothing that was chosen may be kept."""
    choose_backend.cache_clear()
    yield
    choose_backend.cache_clear()


def randn(layout: PackedLayout, head_dim: int, dtype: torch.dtype, heads: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (sum(layout.lengths), heads, head_dim)
    return [torch.randn(shape, generator=generator).to(layout.order.device, dtype) for _ in range(3)]


def by_definition(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """Attention document by document in the dtype of its inputs."""
    out, start = torch.empty_like(q), 0
    for length in layout.lengths:
        part = slice(start, start + length)
        scores = torch.einsum("qhd,khd->hqk", q[part], k[part]) * q.shape[-1] ** -0.5
        out[part] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[part])
        start += length
    return out


def sdpa(dtype: torch.dtype = torch.float32) -> Backend:
    return choose_backend("sdpa", CPU, dtype, 64)


def test_names_are_the_documented_ones_in_the_order_of_preference() -> None:
    assert ATTENTION == ("auto", "flash_attn_3", "flash_attn", "torch_varlen", "xformers", "sdpa")
    assert tuple(NAMES) == ATTENTION[1:]


# Values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "device"),
    [*(pytest.param(name, CUDA, marks=pytest.mark.cuda) for name in NAMES), ("sdpa", CPU)],
    ids=lambda value: str(value),
)
def test_backend_equals_the_definition(
    name: str, device: torch.device, layout_name: str, head_dim: int, dtype: torch.dtype
) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{name}: no CUDA device")
    reasons = BACKENDS[NAMES.index(name)].unsupported_reasons(device, dtype, head_dim)
    if reasons:
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    layout = layout_of(layout_name, device)
    q, k, v = randn(layout, head_dim, dtype)
    out = varlen_attention(q, k, v, layout, choose_backend(name, device, dtype, head_dim))
    assert out.shape == q.shape and out.dtype == dtype and out.device == q.device
    exact = by_definition(q.double(), k.double(), v.double(), layout)
    plain = (by_definition(q, k, v, layout).double() - exact).abs().max()
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= 2 * plain + 2 * rounding


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout_name", ["uneven", "equal"])
def test_no_document_sees_another_on_cuda(name: str, layout_name: str) -> None:
    reasons = BACKENDS[NAMES.index(name)].unsupported_reasons(CUDA, torch.bfloat16, 64)
    if reasons:
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    _no_document_sees_another(
        choose_backend(name, CUDA, torch.bfloat16, 64), layout_of(layout_name, CUDA), torch.bfloat16
    )


@pytest.mark.parametrize("layout_name", ["uneven", "equal"])
def test_no_document_sees_another(layout_name: str) -> None:
    _no_document_sees_another(sdpa(), layout_of(layout_name), torch.float32)


def _no_document_sees_another(backend: Backend, layout: PackedLayout, dtype: torch.dtype) -> None:
    q, k, v = randn(layout, 64, dtype)
    before = varlen_attention(q, k, v, layout, backend).split(layout.lengths)
    for x in (q, k, v):
        x.split(layout.lengths)[1].mul_(-3.0)
    after = varlen_attention(q, k, v, layout, backend).split(layout.lengths)
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [index != 1 for index in range(len(same))]


def test_strided_inputs_are_taken() -> None:
    layout = layout_of("uneven")
    q, k, v = (torch.stack(randn(layout, 64, torch.float32), dim=1)[:, i] for i in range(3))
    out = varlen_attention(q, k, v, layout, sdpa())
    torch.testing.assert_close(out, varlen_attention(q.clone(), k.clone(), v.clone(), layout, sdpa()))


@pytest.mark.parametrize("layout_name", ["one", "uneven", "equal"])
def test_sdpa_compiles_into_one_graph(layout_name: str) -> None:
    layout, backend = layout_of(layout_name), sdpa()
    q, k, v = randn(layout, 64, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(varlen_attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v, layout, backend), varlen_attention(q, k, v, layout, backend))


@pytest.mark.parametrize("wrong", ["short", "value", "batch"])
def test_shapes_that_do_not_fit_the_layout_are_refused(wrong: str) -> None:
    layout = layout_of("uneven")
    q, k, v = randn(layout, 64, torch.float32)
    inputs = {"short": (q[1:], k[1:], v[1:]), "value": (q, k, v[:, :1]), "batch": (q[None], k[None], v[None])}[wrong]
    with pytest.raises(ValueError, match=r"varlen_attention: q, k and v must be \(270, heads, head_dim\)"):
        varlen_attention(*inputs, layout, sdpa())


def test_backend_that_is_not_loaded_says_how_to_get_one() -> None:
    layout = layout_of("one")
    with pytest.raises(RuntimeError, match="take it from choose_backend"):
        varlen_attention(*randn(layout, 64, torch.float32), layout, BACKENDS[0])


# How packages are called


class FakeKernel:
    """A function of a package: keeps how it was called, and returns its first tensor, or what `answer` makes of it."""

    def __init__(self, answer: Callable[[Tensor], Any] = lambda x: x) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._answer = answer

    def __call__(self, *positional: Any, **keywords: Any) -> Any:
        self.calls.append((positional, keywords))
        return self._answer([*positional, *keywords.values()][0])


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: object) -> None:
    module = ModuleType(name)
    module.__dict__.update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
    choose_backend.cache_clear()


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Makes packages not installed."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("returns_sums", [False, True])
@pytest.mark.parametrize(
    ("name", "module"),
    [("flash_attn_3", "flash_attn_interface"), ("flash_attn_3", "fa3_fwd_interface"), ("flash_attn", "flash_attn")],
)
def test_flash_attention_is_called_with_keywords(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, returns_sums: bool
) -> None:
    function = FakeKernel(lambda q: (q, q[..., 0]) if returns_sums else q)
    hide(monkeypatch, "flash_attn_interface", "fa3_fwd_interface", "flash_attn")
    fake(monkeypatch, module, flash_attn_varlen_func=function)
    layout = layout_of("uneven")
    q, k, v = randn(layout, 64, torch.bfloat16)
    backend = BACKENDS[NAMES.index(name)].load(torch.bfloat16)
    assert varlen_attention(q, k, v, layout, backend) is q
    [(positional, keywords)] = function.calls
    assert positional == () and [keywords.pop(key) for key in "qkv"] == [q, k, v]
    assert keywords.pop("cu_seqlens_q") is layout.cu_seqlens and keywords.pop("cu_seqlens_k") is layout.cu_seqlens
    assert keywords == {"max_seqlen_q": 130, "max_seqlen_k": 130, "softmax_scale": 0.125, "causal": False}
    assert type(layout.max_seqlen) is int


def test_torch_varlen_is_called_with_its_seven_positional_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    function = FakeKernel()
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", function)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    layout = layout_of("uneven")
    q, k, v = randn(layout, 64, torch.bfloat16)
    backend = BACKENDS[NAMES.index("torch_varlen")].load(torch.bfloat16)
    assert varlen_attention(q, k, v, layout, backend) is q
    [(positional, keywords)] = function.calls
    expected = (q, k, v, layout.cu_seqlens, layout.cu_seqlens, 130, 130)
    assert keywords == {} and len(positional) == 7 and all(map(lambda a, b: a is b or a == b, positional, expected))


def test_xformers_gets_one_mask_for_each_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    function, from_seqlens = FakeKernel(), FakeKernel(tuple)
    fmha = ModuleType("xformers.ops.fmha")
    fmha.BlockDiagonalMask = type("Mask", (), {"from_seqlens": from_seqlens})  # type: ignore[attr-defined]
    fake(monkeypatch, "xformers")
    fake(monkeypatch, "xformers.ops", memory_efficient_attention=function, fmha=fmha)
    backend = BACKENDS[NAMES.index("xformers")].load(torch.float32)
    layout, other = layout_of("uneven"), layout_of("equal")
    for each in (layout, layout, other):
        q, k, v = randn(each, 64, torch.float32)
        assert varlen_attention(q, k, v, each, backend).shape == q.shape
    assert from_seqlens.calls == [
        ((), {"q_seqlen": [45, 130, 31, 64], "device": CPU}),
        ((), {"q_seqlen": [32] * 9, "device": CPU}),
    ]
    assert all(positional == () and keywords["query"].shape[0] == 1 for positional, keywords in function.calls)
    masks = [keywords["attn_bias"] for _, keywords in function.calls]
    assert masks[0] is masks[1] == (45, 130, 31, 64) and masks[2] == (32,) * 9


# Choosing


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that seems to have an H100 and none of the packages."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    hide(monkeypatch, "flash_attn_interface", "fa3_fwd_interface", "flash_attn", "xformers")
    return monkeypatch


def broken(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> None:
    """Installs a package that is found and fails to import, as one built for another torch does."""
    (folder / f"{name}.py").write_text("raise OSError('undefined symbol: _ZN3c10\\nmore of it')\n")
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_auto_on_cpu_is_sdpa(dtype: torch.dtype) -> None:
    assert choose_backend("auto", CPU, dtype, 80).name == "sdpa"


@pytest.mark.parametrize("name", ["flash", "FLASH_ATTN_2", "", "torch sdpa"])
def test_unknown_name_is_refused(name: str) -> None:
    for call in (check_attention, lambda name: choose_backend(name, CPU, torch.float32, 64)):
        with pytest.raises(ConfigError, match=f"attention must be one of auto, .*, got '{name}'; "):
            call(name)


@pytest.mark.parametrize("name", ATTENTION)
def test_known_name_is_accepted(name: str) -> None:
    check_attention(name)


@pytest.mark.parametrize("name", OF_CUDA)
def test_forced_backend_lists_every_reason_at_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    hide(
        monkeypatch, "flash_attn_interface", "fa3_fwd_interface", "flash_attn", "xformers", "torch.nn.attention.varlen"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as raised:
        choose_backend(name, CUDA, torch.float64, 300)
    first, *reasons = str(raised.value).splitlines()
    assert f"got '{name}'; use attention=\"auto\"" in first and "float64 with head dim 300 on cuda" in first
    assert [reason.split()[-1] for reason in reasons] == ["installed", "device", "float64", "300"]


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "says"),
    [
        ("flash_attn_3", (8, 9), torch.bfloat16, "needs compute capability 9.0 for bfloat16, got 8.9"),
        ("flash_attn_3", (12, 0), torch.bfloat16, "needs compute capability 9.0 for bfloat16, got 12.0"),
        ("flash_attn", (7, 5), torch.float32, "needs compute capability 8.0 or newer for float32, got 7.5"),
        ("torch_varlen", (7, 5), torch.float16, "needs compute capability 8.0 or newer for float16, got 7.5"),
        ("xformers", (7, 5), torch.bfloat16, "needs compute capability 8.0 or newer for bfloat16, got 7.5"),
        ("xformers", (10, 0), torch.float32, "needs compute capability 7.5 to 9.0 for float32, got 10.0"),
        ("flash_attn", (8, 0), torch.bfloat16, None),
        ("xformers", (7, 5), torch.float16, None),
        ("xformers", (9, 0), torch.float32, None),
        ("sdpa", (5, 0), torch.bfloat16, None),
    ],
)
def test_compute_capability_is_judged_by_dtype(
    hopper: pytest.MonkeyPatch, name: str, capability: tuple[int, int], dtype: torch.dtype, says: str | None
) -> None:
    hopper.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    reasons = BACKENDS[NAMES.index(name)].unsupported_reasons(CUDA, dtype, 64)
    assert [reason for reason in reasons if "capability" in reason] == ([] if says is None else [says])


@pytest.mark.parametrize("head_dim", [4, 100, 264, 0])
@pytest.mark.parametrize("name", OF_CUDA)
def test_head_dim_is_judged(hopper: pytest.MonkeyPatch, name: str, head_dim: int) -> None:
    last = BACKENDS[NAMES.index(name)].unsupported_reasons(CUDA, torch.float16, head_dim)[-1]
    assert last == f"takes head dims up to 256 that are multiples of 8, got {head_dim}"


def test_tensors_of_the_cpu_are_refused_where_there_is_cuda(hopper: pytest.MonkeyPatch) -> None:
    assert "needs a CUDA device, got cpu" in BACKENDS[1].unsupported_reasons(CPU, torch.bfloat16, 64)


def test_auto_on_cuda_takes_the_first_that_is_there(hopper: pytest.MonkeyPatch) -> None:
    assert choose_backend("auto", CUDA, torch.bfloat16, 128).name == "torch_varlen"
    assert choose_backend("auto", CUDA, torch.float32, 128).name == "sdpa"
    fake(hopper, "flash_attn", flash_attn_varlen_func=FakeKernel())
    assert choose_backend("auto", CUDA, torch.bfloat16, 128).name == "flash_attn"
    fake(hopper, "fa3_fwd_interface", flash_attn_varlen_func=FakeKernel())
    assert choose_backend("auto", CUDA, torch.bfloat16, 128).name == "flash_attn_3"


def test_forward_only_flash_attention_3_takes_no_float16(hopper: pytest.MonkeyPatch) -> None:
    fake(hopper, "fa3_fwd_interface", flash_attn_varlen_func=FakeKernel())
    assert BACKENDS[0].unsupported_reasons(CUDA, torch.float16, 64) == ["takes bfloat16, got float16"]
    assert choose_backend("auto", CUDA, torch.float16, 128).name == "torch_varlen"
    fake(hopper, "flash_attn_interface", flash_attn_varlen_func=FakeKernel())
    assert choose_backend("auto", CUDA, torch.float16, 128).name == "flash_attn_3"


def test_auto_passes_over_a_package_that_fails_to_import(
    hopper: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken(hopper, tmp_path, "flash_attn")
    assert choose_backend("auto", CUDA, torch.bfloat16, 64).name == "torch_varlen"
    assert "flash_attn is passed over: flash-attn is installed but fails to import (OSError: undefined" in caplog.text


def test_forced_package_that_fails_to_import_says_so(hopper: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken(hopper, tmp_path, "flash_attn")
    with pytest.raises(ConfigError) as raised:
        choose_backend("flash_attn", CUDA, torch.bfloat16, 64)
    _, *reasons = str(raised.value).splitlines()
    assert reasons == ["  flash-attn is installed but fails to import (OSError: undefined symbol: _ZN3c10)"]


def test_second_package_stands_in_for_a_first_that_fails_to_import(hopper: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken(hopper, tmp_path, "flash_attn_interface")
    fake(hopper, "fa3_fwd_interface", flash_attn_varlen_func=FakeKernel())
    assert choose_backend("flash_attn_3", CUDA, torch.bfloat16, 64).name == "flash_attn_3"
    with pytest.raises(ConfigError, match="flash-attn-3 is installed but fails to import"):
        choose_backend("flash_attn_3", CUDA, torch.float16, 64)


def test_package_without_the_function_counts_as_failing(hopper: pytest.MonkeyPatch) -> None:
    fake(hopper, "flash_attn")  # as version 1 is
    with pytest.raises(ConfigError, match=r"fails to import \(AttributeError: .*flash_attn_varlen_func"):
        choose_backend("flash_attn", CUDA, torch.bfloat16, 64)


def test_torch_without_flash_attention_is_passed_over(hopper: pytest.MonkeyPatch) -> None:
    hopper.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert choose_backend("auto", CUDA, torch.bfloat16, 64).name == "sdpa"


def test_auto_lists_the_reasons_of_all_where_nothing_is_usable(hopper: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as raised:
        choose_backend("auto", CUDA, torch.int8, 64)
    _, *reasons = str(raised.value).splitlines()
    assert [reason.split(":")[0].strip() for reason in reasons] == NAMES


def test_folder_without_a_package_is_not_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "no_such_package" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_found("no_such_package")
    assert is_found("torch.nn.attention.varlen") and not is_found("torch.no_such.module")


def test_finding_out_imports_no_package_and_starts_no_cuda() -> None:
    code = """
import sys, torch
from jitaccel.execution.attention.choice import BACKENDS
for backend in BACKENDS:
    backend.unsupported_reasons(torch.device("cpu"), torch.bfloat16, 64)
print(torch.cuda.is_initialized(), {name.partition(".")[0] for name in sys.modules} & {
    "flash_attn", "flash_attn_interface", "fa3_fwd_interface", "xformers", "diffusers", "numpy.testing"})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "set()"]
