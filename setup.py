"""Metadata is in pyproject.toml. POLYFUSION_BUILD_CUDA=1 builds the CUDA extension as well."""

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildCuda(build_ext):
    """Build with polyfusion/build.py, into the package."""

    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split(".")).with_suffix(".so"))

    def build_extension(self, extension: Extension) -> None:
        path = Path(__file__).with_name("polyfusion") / "build.py"
        spec = importlib.util.spec_from_file_location("polyfusion_build", path)
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        try:
            build.compile_library(Path(self.get_ext_fullpath(extension.name)), False, print)
        except build.BuildError as error:
            raise SystemExit(f"POLYFUSION_BUILD_CUDA=1: {error}") from None


if os.environ.get("POLYFUSION_BUILD_CUDA") == "1":
    cuda = {
        "ext_modules": [Extension("polyfusion._cuda", [])],
        "cmdclass": {"build_ext": BuildCuda},
    }
else:
    cuda = {}
setup(**cuda)
