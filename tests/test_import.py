"""The cost and side effects of importing the package. Each import runs in a separate process."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODEBASES = {"accelerate", "comfy", "diffusers", "flash_attn", "peft", "transformers", "xformers"}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def modules_after(code: str) -> set[str]:
    loaded = json.loads(run(f"import json, sys\n{code}\nprint(json.dumps(list(sys.modules)))"))
    return {name.partition(".")[0] for name in loaded}


def test_import_prints_nothing() -> None:
    assert run("import jitaccel") == ""


def test_import_loads_no_third_party_package() -> None:
    loaded = modules_after("import jitaccel")
    assert not loaded & (CODEBASES | {"numpy", "safetensors", "scipy", "torch"})


def test_public_names_load_without_any_codebase() -> None:
    loaded = modules_after("import jitaccel\nfor name in jitaccel.__all__: getattr(jitaccel, name)")
    assert not loaded & CODEBASES


def test_patches_load_without_any_codebase() -> None:
    loaded = modules_after("import jitaccel.patches")
    assert not loaded & CODEBASES


def test_import_initialises_no_cuda() -> None:
    code = "import torch, jitaccel, jitaccel.patches\nfor name in jitaccel.__all__: getattr(jitaccel, name)\n"
    assert run(code + "print(torch.cuda.is_initialized())") == "False\n"


def test_import_star_gives_the_public_names() -> None:
    assert (
        run("from jitaccel import *\nimport jitaccel\nprint(set(jitaccel.__all__) <= set(globals()))")
        == "True\n"
    )


def test_version_is_the_projects_and_light() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert run("import jitaccel\nprint(jitaccel.__version__)") == f"{project['version']}\n"
    loaded = modules_after("import jitaccel\njitaccel.__version__")
    assert not loaded & (CODEBASES | {"numpy", "torch"})


def test_unknown_name_raises_attribute_error() -> None:
    assert run("import jitaccel\nprint(hasattr(jitaccel, 'no_such_name'))") == "False\n"
