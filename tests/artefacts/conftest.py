"""One export shared by all tests, and copies of it to damage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock  # torch needs it

from tests.support import tiny
from tests.support.exports import TWO_STAGES, export


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages of the pipeline with seed 0, traced."""
    return export(tiny.pipeline(), tmp_path_factory.mktemp("artefacts") / "with space")


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@pytest.fixture(scope="session")
def aoti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages of the pipeline with seed 0, compiled."""
    if " " in torch.__file__:
        pytest.skip("torch's inductor does not quote its own path to the C++ compiler")
    options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    return _made_once(
        shared, "aoti", lambda folder: export(tiny.pipeline(), folder, TWO_STAGES, format="aoti", options=options)
    )


def _made_once(shared: Path, name: str, make: Callable[[Path], object]) -> Path:
    """Returns a folder that the first worker to ask for it makes; the others wait for it."""
    with FileLock(shared / f"{name}.lock"):
        if not (shared / name).exists():
            make(shared / name)
    return shared / name
