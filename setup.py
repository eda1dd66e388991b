"""What pyproject.toml cannot say: folders beside jitaccel/ install inside it, and operators are compiled.

The checkout holds links to them (jitaccel/patches, jitaccel/assets, jitaccel/benchmarks), so that the package imports
from there uninstalled and type checkers see it whole. The build never reads them: where git writes no links (Windows)
or a copy drops them, an install is still complete. csrc/ installs too, so that `python -m jitaccel.build` can compile
what a wheel lacks.

The operators are two shared libraries without any Python in them (jitaccel/build.py): one wheel serves every Python 3.
"""

import importlib.util
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NOT_INSTALLED = ["checkout", "checkout.*"]  # benchmarks that need the stand-ins of tests/
FOLDERS = {
    "jitaccel.patches": "patches",
    "jitaccel.assets": "assets",
    "jitaccel.benchmarks": "benchmarks",
    "jitaccel.csrc": "csrc",
}

# By its path: the folder of this file is not on the path of a build, and importing the package is not wanted.
spec = importlib.util.spec_from_file_location("jitaccel_build", Path(__file__).parent / "jitaccel" / "build.py")
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)


class BuildOperators(build_ext):
    """Hands each library to jitaccel/build.py, which may leave one out where its compiler is missing."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        native.build(ext.name.rpartition("_")[2], Path(self.get_ext_fullpath(ext.name)).resolve())


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel for any Python 3, and for a platform where it holds a library."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2] if any(Path(self.bdist_dir, "jitaccel").glob("_C_*.so")) else "any"
        return "py3", "none", platform


def path_is_enough(arguments: Sequence[str]) -> bool:
    """Whether an editable install may be the checkout on the path: all is inside jitaccel/ already, through links.

    Else it would be a finder, which comes after the path: to a script beside the clone, the clone's folder of the same
    name is the package then, and an empty one.
    """
    inside = (Path(name.replace(".", "/")) for name in FOLDERS if name != "jitaccel.csrc")
    return "editable_wheel" in arguments and all(folder.is_dir() for folder in inside)


def readme_of_index(text: str, repository: str | None) -> str:
    """Returns README as a package index shows it, where links to files of the checkout would lead nowhere.

    They lead into the repository that pyproject.toml names, or are text without one; pictures are left out then.
    """

    def link(match: re.Match[str]) -> str:
        picture, shown, path = match.groups()
        if repository is None:
            return "" if picture else shown
        return f"{picture}[{shown}]({repository.rstrip('/')}/{'raw' if picture else 'blob'}/main/{path})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)", link, text)


folder = Path(__file__).parent
urls = tomllib.loads((folder / "pyproject.toml").read_text())["project"].get("urls", {})
editable = path_is_enough(sys.argv)
links = [pattern for name in FOLDERS for pattern in (name, f"{name}.*")]
packages = find_packages(include=["jitaccel", "jitaccel.*"], exclude=links)
for name, inside in FOLDERS.items():
    if Path(inside).is_dir() and not editable:
        packages += [name, *(f"{name}.{inner}" for inner in find_packages(inside, exclude=NOT_INSTALLED))]

setup(
    long_description=readme_of_index((folder / "README.md").read_text(encoding="utf-8"), urls.get("Repository")),
    long_description_content_type="text/markdown",
    packages=packages,
    package_dir={"": "."} if editable else FOLDERS,
    package_data={
        "jitaccel": ["py.typed"],
        "jitaccel.view.templates": ["*.j2", "*.css", "*.js"],
        "jitaccel.assets": ["**/*"],
        "jitaccel.patches.comfyui": ["pyproject.toml"],
        "jitaccel.csrc": ["*"],
    },
    exclude_package_data={"jitaccel.assets": ["**/*.pyc"]},
    # Optional: an install without a compiler is complete, it runs on plain torch and says so.
    ext_modules=[Extension(f"jitaccel._C_{kind}", [], optional=True) for kind in native.KINDS],
    cmdclass={"build_ext": BuildOperators, "bdist_wheel": AnyPythonWheel},
)
