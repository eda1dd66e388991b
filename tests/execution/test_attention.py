"""Attention of packed execution: backends against float64, calls of packages, and the choice of a backend."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor

from jitaccel.execution.attention.choice import (
    ATTENTION,
    BACKENDS,
    Backend,
    choose_backend,
    varlen_attention,
)
from jitaccel.execution.packing import PackedLayout
from tests.support.attention import CPU, CUDA, LAYOUTS, NAMES, FakeKernel, fake, hide, layout_of, randn

pytestmark = pytest.mark.usefixtures("chosen_anew")


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
