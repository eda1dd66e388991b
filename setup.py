"""What pyproject.toml cannot say: two folders beside jitaccel/ install inside it.

The checkout holds the links jitaccel/patches and jitaccel/assets, so that the package imports from there uninstalled
and type checkers see it whole. The build never reads them: where git writes no links (Windows) or a copy drops them,
an install is still complete.

The build of the native operators belongs in this file.
"""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = {"jitaccel.patches": "patches", "jitaccel.assets": "assets"}

links = [pattern for name in FOLDERS for pattern in (name, f"{name}.*")]
packages = find_packages(include=["jitaccel", "jitaccel.*"], exclude=links)
for name, folder in FOLDERS.items():
    if Path(folder, "__init__.py").is_file():
        packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]

setup(
    packages=packages,
    package_dir=FOLDERS,
    package_data={"jitaccel": ["py.typed"], "jitaccel.assets": ["**/*"]},
    exclude_package_data={"jitaccel.assets": ["**/*.pyc"]},
)
