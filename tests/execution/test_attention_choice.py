"""Which attention is chosen, and why others cannot be used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.attention.varlen

from jitaccel.errors import ConfigError
from jitaccel.execution.attention.backend import is_found
from jitaccel.execution.attention.choice import (
    ATTENTION,
    BACKENDS,
    check_attention,
    choose_backend,
)
from tests.support.attention import CPU, CUDA, NAMES, OF_CUDA, FakeKernel, fake, hide

pytestmark = pytest.mark.usefixtures("chosen_anew")


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
    assert "flash_attn is skipped: flash-attn is installed but fails to import (OSError: undefined" in caplog.text


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
