"""The package with the sources of its CUDA kernels, and their optional build ahead of time.

Everything else is in pyproject.toml. ``POLYFUSION_BUILD_CUDA=1 pip install .`` compiles the kernels
into the package, so that nobody has to run ``python -m polyfusion.build``.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH = "torch>=2.11,<2.14"  # as in pyproject.toml: its headers are needed to compile


class BuildCuda(build_ext):
    """Build with polyfusion/build.py, into the package."""

    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split(".")).with_suffix(".so"))

    def build_extension(self, extension: Extension) -> None:
        spec = importlib.util.spec_from_file_location("_build", ROOT / "polyfusion" / "build.py")
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        try:
            build.compile_library(Path(self.get_ext_fullpath(extension.name)), False, print)
        except build.BuildError as error:
            raise SystemExit(f"POLYFUSION_BUILD_CUDA=1: {error}") from None


cuda = {
    "ext_modules": [Extension("polyfusion._cuda", [])],
    "cmdclass": {"build_ext": BuildCuda},
    "setup_requires": [TORCH],  # an isolated build installs it; an ordinary one needs no PyTorch
}
setup(
    packages=[*find_packages(include=["polyfusion", "polyfusion.*"]), "polyfusion.csrc"],
    package_dir={"polyfusion.csrc": "csrc"},
    **(cuda if os.environ.get("POLYFUSION_BUILD_CUDA") == "1" else {}),
)
