"""Compiling the operators: kinds that are built, kinds that are left out with a message, and sanitizer runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jitaccel import build, ops

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/ops/test_operators.py"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists(), reason="no nvcc"
)
USE = """
import torch
from jitaccel import ops
from jitaccel.method.lift import lift, make_lift_plan
plan = make_lift_plan(torch.tensor([[0, 3, 7]]), (3, 4))
print(lift(torch.tensor([[[1.0], [2.0], [3.0]]]), plan).flatten().tolist())
print(sorted(ops.compiled()), torch.ops.jitaccel.importance(torch.ones(1, 4, 1), [2, 2]).tolist())
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def clear(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JITACCEL_CPU", "JITACCEL_CUDA", "CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)


# Switches and missing tools


def test_switch_0_leaves_a_library_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JITACCEL_CPU", "0")
    assert not build.build("cpu", tmp_path / "_C_cpu.so")
    assert not list(tmp_path.iterdir())


def test_switch_must_be_one_of_three(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JITACCEL_CPU", "yes")
    with pytest.raises(RuntimeError, match="JITACCEL_CPU must be auto, 0 or 1, got 'yes'"):
        build.build("cpu", tmp_path / "_C_cpu.so")


@pytest.mark.parametrize(("kind", "tool"), [("cpu", r"no C\+\+ compiler"), ("cuda", "no nvcc")])
def test_missing_compiler_skips_with_a_reason_or_fails_where_it_must_not(
    kind: str, tool: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clear(monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not build.build(kind, tmp_path / "x.so")
    assert f"WARNING: {kind} operators not built, plain torch runs" in capsys.readouterr().err
    monkeypatch.setenv(f"JITACCEL_{kind.upper()}", "1")
    with pytest.raises(RuntimeError, match=f"=1, but {tool}"):
        build.build(kind, tmp_path / "x.so")


def test_torch_is_found_without_importing_it_and_an_old_one_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = "import sys; from jitaccel import build; print(build.find_torch()); assert 'torch' not in sys.modules"
    assert Path(python(code).stdout.strip()) == Path(torch.__file__).parent
    (tmp_path / "include/torch/csrc/stable").mkdir(parents=True)
    (tmp_path / "include/torch/csrc/stable/library.h").touch()
    monkeypatch.setenv("JITACCEL_TORCH", str(tmp_path))
    with pytest.raises(build.MissingToolError, match=r"older than 2\.10"):
        build.find_torch()


def test_torch_that_uv_hides_is_missed_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_torch_folders", lambda: iter(()))
    monkeypatch.delenv("UV", raising=False)
    with pytest.raises(build.MissingToolError, match=r"with headers for .*python\S*$"):
        build.find_torch()
    monkeypatch.setenv("UV", "/usr/bin/uv")
    with pytest.raises(build.MissingToolError, match="--no-build-isolation or JITACCEL_TORCH=FOLDER"):
        build.find_torch()


@needs_compiler
def test_failing_compiler_is_a_warning_or_an_error_where_asked_for_and_keeps_the_old_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clear(monkeypatch)
    out = tmp_path / "_C_cpu.so"
    out.write_bytes(b"old")
    monkeypatch.setenv("JITACCEL_CXXFLAGS", "-fno-such-option")
    assert not build.build("cpu", out)
    warning = capsys.readouterr().err
    assert "WARNING: cpu operators not built, plain torch runs" in warning and "fno-such-option" in warning
    with pytest.raises(RuntimeError, match="the cpu library is asked for, but the compiler failed"):
        build.build("cpu", out, required=True)
    monkeypatch.setenv("JITACCEL_CPU", "1")
    with pytest.raises(RuntimeError, match="JITACCEL_CPU=1, but the compiler failed"):
        build.build("cpu", out)
    assert out.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_compiler_that_cannot_be_run_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clear(monkeypatch)
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match=r"none cannot be run: .*; check CXX"):
        build.build("cpu", tmp_path / "_C_cpu.so", required=True)


def test_library_named_on_the_command_line_must_be_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clear(monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    build.main(["--out", str(tmp_path)])
    assert "WARNING: cuda operators not built" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        build.main(["cpu", "--out", str(tmp_path)])
    assert "the cpu library is asked for, but no C++ compiler" in capsys.readouterr().err


@pytest.mark.parametrize(("platform", "skipped"), [("linux", []), ("darwin", ["cuda"]), ("win32", ["cpu", "cuda"])])
def test_auto_tries_only_what_can_work(platform: str, skipped: list[str]) -> None:
    assert [kind for kind in build.KINDS if build.unsupported_reason(kind, platform) is not None] == skipped


def test_auto_on_windows_calls_no_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clear(monkeypatch)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: pytest.fail("a compiler was called"))
    assert not build.build("cpu", tmp_path / "_C_cpu.so")
    assert "not for Windows" in capsys.readouterr().err


def test_unknown_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build.main(["rocm"])
    assert "KIND must be cpu or cuda, got rocm" in capsys.readouterr().err


# What is loaded


def test_fallback_runs_and_says_so_where_nothing_is_built(tmp_path: Path) -> None:
    compiled, fallback = python(USE), python(USE, JITACCEL_LIBRARIES=str(tmp_path))
    assert fallback.returncode == 0, fallback.stderr
    assert fallback.stdout.splitlines()[1].startswith("[] [[")
    for one, other in zip(*(done.stdout.splitlines() for done in (compiled, fallback)), strict=True):
        numbers = [[float(x) for x in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", line)] for line in (one, other)]
        assert numbers[0] and numbers[0] == pytest.approx(numbers[1], rel=1e-6)
    assert "_C_cpu.so is not built" in fallback.stderr and "python -m jitaccel.build" in fallback.stderr


@needs_compiler
def test_library_of_other_sources_is_not_loaded(tmp_path: Path) -> None:
    wanted = build.source_hash("cpu")
    assert wanted is not None
    library = ops.compiled()["cpu"].read_bytes()
    assert library.count(wanted.encode()) == 1
    (tmp_path / "_C_cpu.so").write_bytes(library.replace(wanted.encode(), b"0" * len(wanted)))
    done = python(USE, JITACCEL_LIBRARIES=str(tmp_path))
    assert "_C_cpu.so was built from other sources" in done.stderr
    assert done.stdout.splitlines()[1].startswith("[] ")


@needs_compiler
def test_library_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    (tmp_path / "_C_cpu.so").write_text(f"jitaccel-sources:{build.source_hash('cpu')}")
    done = python(USE, JITACCEL_LIBRARIES=str(tmp_path))
    assert "_C_cpu.so cannot be loaded" in done.stderr and done.returncode == 0


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.skipif(sys.platform != "linux", reason="version scripts are Linux's")
def test_libraries_export_nothing() -> None:
    assert ops.compiled(), ops.missing()
    for library in ops.compiled().values():
        symbols = [
            subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True).stdout
            for which in ("--defined-only", "--undefined-only")
        ]
        assert symbols[0] == "" and "aoti_torch" in symbols[1]


# Compilers


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++-9", "g++-10", "g++-11", "g++-13", "g++-14", "clang++-14"])
def test_other_compilers_build_operators_that_work(
    compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    clear(monkeypatch)
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("JITACCEL_CXXFLAGS", "-O1")  # the versions of a function differ at any level
    assert build.build("cpu", tmp_path / "_C_cpu.so", required=True)
    assert "['cpu']" in python(USE, JITACCEL_LIBRARIES=str(tmp_path)).stdout
    chosen = ["-k", "test_pool or importance or lift or micro_flow", TESTS, "tests/ops/test_pool.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen],
        cwd=ROOT,
        env={**os.environ, "JITACCEL_LIBRARIES": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "passed" in done.stdout, (done.stdout + done.stderr)[-6000:]


# CUDA


@needs_nvcc
def test_architectures_are_those_asked_for_or_all_that_nvcc_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    clear(monkeypatch)
    options = build.architecture_options(build.find_nvcc())
    assert {"arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]"} <= set(options)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0+PTX")
    assert build.architecture_options(build.find_nvcc()) == [
        "-gencode", "arch=compute_86,code=sm_86", "-gencode", "arch=compute_90,code=[sm_90,compute_90]",
    ]  # fmt: skip


@needs_nvcc
def test_cuda_library_is_built_for_every_architecture_and_from_these_sources() -> None:
    library = build.library_path("cuda")
    assert library.is_file(), "run python -m jitaccel.build cuda"
    assert f"jitaccel-sources:{build.source_hash('cuda')}".encode() in library.read_bytes()
    made_for = {int(number) for number in re.findall(rb"sm_(\d+)", library.read_bytes())}
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        assert {80, 90, 100, 120} <= made_for


@needs_nvcc
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_cuda_library_loads_beside_a_cuda_torch() -> None:
    assert "cuda" in ops.compiled(), ops.missing()


@pytest.mark.parametrize(
    ("linked", "torch_cuda", "fits"),
    [("13", "13.0", True), ("12", "13.0", True), ("13", "12.8", False), (None, "12.8", True)],
)
def test_cuda_library_is_not_used_by_a_torch_of_a_smaller_cuda(
    linked: str | None, torch_cuda: str, fits: bool, tmp_path: Path
) -> None:
    library = tmp_path / "_C_cuda.so"
    library.write_bytes(b"\0jitaccel-cuda-major:%s;\0" % linked.encode() if linked else b"\0")
    reason = build.cuda_mismatch(library, torch_cuda)
    assert reason is None if fits else reason and f"CUDA {linked} and torch is built for CUDA {torch_cuda}" in reason


def test_cuda_library_of_a_larger_cuda_is_told_and_not_loaded(tmp_path: Path) -> None:
    marks = f"jitaccel-sources:{build.source_hash('cuda')} jitaccel-cuda-major:99;"
    (tmp_path / "_C_cuda.so").write_text(marks)  # loading it would fail with another reason
    code = f"import torch; torch.version.cuda = '12.8'\n{USE}\nprint(ops.missing()['cuda'])"
    done = python(code, JITACCEL_LIBRARIES=str(tmp_path))
    assert "linked with CUDA 99 and torch is built for CUDA 12.8" in done.stdout.splitlines()[-1], done.stderr


@needs_nvcc
def test_cuda_library_says_what_it_was_linked_with() -> None:
    said = subprocess.run([build.find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    major = re.search(r"release (\d+)", said)
    assert major and f"jitaccel-cuda-major:{major[1]};".encode() in build.library_path("cuda").read_bytes()


# Sanitizers


@needs_compiler
@pytest.mark.slow
def test_sanitizers_find_nothing_in_what_the_operators_tests_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clear(monkeypatch)
    assert build.build("cpu", tmp_path / "_C_cpu.so", sanitize=True, required=True)
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip("this g++ comes without the sanitizers' runtimes")
    # Python never frees all it has, and torch's libraries repeat symbols: neither is this library's.
    chosen = "not (compile or export or torchscript or opcheck or threads)"  # those run nothing else of the library
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, TESTS],
        cwd=ROOT,
        env={
            **os.environ,
            "LD_PRELOAD": ":".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            "JITACCEL_LIBRARIES": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "passed" in done.stdout and "ERROR: AddressSanitizer" not in done.stderr
