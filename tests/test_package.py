"""What others install: the wheel has the whole library and nothing else, and works by itself."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from polyfusion import __version__

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUN_FROM_THE_CLONE = ("model", "train", "bench")
# No caches, no builds, no runs: what a clone has.
LEFT_OUT = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "*.so", "build", "dist", "runs", "results", "docs"
)


def imports(folder: Path) -> set[str]:
    """Top-level names of all that the files below a folder import absolutely."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def names(requirements: list[str]) -> set[str]:
    """Names of the distributions asked for."""
    return {Requirement(text).name for text in requirements}


def test_the_library_imports_what_it_requires_and_nothing_above_it():
    comes_with_torch = {"filelock"}
    allowed = names(PROJECT["dependencies"]) | comes_with_torch | {"polyfusion"}
    assert imports(ROOT / "polyfusion") <= allowed


@pytest.mark.parametrize("folder", ["model", "train"])
def test_extras_hold_what_the_system_imports(folder):
    extras = PROJECT["optional-dependencies"]
    asked = [x for name, extra in extras.items() if name not in ("bench", "test") for x in extra]
    allowed = names(PROJECT["dependencies"] + asked)
    where = packages_distributions() | {"dlib": ["dlib-bin"]}  # its wheel does not name its module
    for module in imports(ROOT / folder) - {"polyfusion", *RUN_FROM_THE_CLONE}:
        # gradio is not installed for the tests, but its distribution has the module's name
        assert allowed & set(where.get(module, [module])), f"{folder} imports {module}"


@dataclass(frozen=True)
class Built:
    """The two files that a release uploads."""

    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the clone, so that building leaves nothing in it."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "clone", ignore=LEFT_OUT)


@pytest.fixture(scope="module")
def built(source) -> Built:
    """The sdist of the clone, and the wheel of that sdist."""
    run([sys.executable, "-m", "build", "--no-isolation"], cwd=source)
    (wheel,), (sdist,) = source.glob("dist/*.whl"), source.glob("dist/*.tar.gz")
    return Built(wheel, sdist)


def run(command: list[str | Path], cwd: Path) -> str:
    """Run a command without this clone on its path, and return what it printed."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key != "PYTHONPATH" and not key.startswith("PYTEST_")
    }
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(built):
    held = set(zipfile.ZipFile(built.wheel).namelist())
    about = f"polyfusion-{__version__}.dist-info"
    assert {name.split("/")[0] for name in held} == {"polyfusion", about}
    inside = {name for name in held if name.startswith("polyfusion/")}
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("polyfusion/**/*.py")}
    sources = {f"polyfusion/csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    assert inside == modules | sources | {"polyfusion/py.typed"}
    assert {"polyfusion/nn/__init__.py", "polyfusion/csrc/bindings.cpp"} <= inside


@pytest.mark.slow
def test_the_wheel_requires_torch_numpy_and_triton(built, tmp_path):
    zipfile.ZipFile(built.wheel).extractall(tmp_path)
    (about,) = tmp_path.glob("*.dist-info")
    wheel = Distribution.at(about)
    always = {Requirement(x) for x in wheel.requires or [] if "extra ==" not in x}
    assert always == {Requirement(x) for x in PROJECT["dependencies"]}
    assert {x.name for x in always} == {"torch", "numpy", "triton"}
    assert wheel.version == __version__


def test_only_a_build_ahead_of_time_asks_for_torch(source, monkeypatch):
    code = "from setuptools.build_meta import *; print(get_requires_for_build_wheel())"
    command = [sys.executable, "-c", code]
    monkeypatch.delenv("POLYFUSION_BUILD_CUDA", raising=False)
    assert run(command, cwd=source).splitlines()[-1] == "[]"
    monkeypatch.setenv("POLYFUSION_BUILD_CUDA", "1")
    (torch,) = (x for x in PROJECT["dependencies"] if x.startswith("torch"))
    assert run(command, cwd=source).splitlines()[-1] == str([torch])


def closure(requirements: list[str]) -> Iterator[Distribution]:
    """Installed distributions that these requirements need, each once, theirs included."""
    todo = [Requirement(text) for text in requirements]
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement = todo.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        new = {(name, extra) for extra in ("", *requirement.extras)} - seen
        if not new:
            continue
        found = distribution(requirement.name)
        if (name, "") in new:
            yield found
        seen |= new
        for text in found.requires or []:
            needed = Requirement(text)
            marker = needed.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for _, extra in new):
                todo.append(needed)


@pytest.fixture(scope="module")
def python(built, tmp_path_factory) -> Path:
    """An environment with the wheel, what it requires, pytest, and nothing else.

    Requirements are links to what is installed here: that is quick and needs no network.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run([python, "-c", code], cwd=folder).strip())
    needed = [text for text in PROJECT["dependencies"] if on_this_platform(text)]
    for found in closure([*needed, "pytest"]):
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            link = packages / top
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file(top))))
    pip = [sys.executable, "-m", "pip", "--python", python]
    run([*pip, "install", "--quiet", "--no-index", "--no-deps", built.wheel], cwd=folder)
    run([*pip, "check"], cwd=folder)  # nothing that the wheel requires is missing
    return python


def on_this_platform(text: str) -> bool:
    """Whether a requirement applies here."""
    marker = Requirement(text).marker
    return marker is None or marker.evaluate()


@pytest.mark.slow
def test_the_installed_library_stands_alone(python, tmp_path):
    code = (
        "import importlib.util as u, polyfusion, polyfusion.nn, polyfusion.build as b;"
        "print(polyfusion.__file__, len(b.source_files()), b.SOURCES.parent == b.PACKAGE,"
        f"*[u.find_spec(x) for x in {(*RUN_FROM_THE_CLONE, 'tests', 'scipy')}])"
    )
    where, sources, inside, *others = run([python, "-c", code], cwd=tmp_path).split()
    assert Path(where).is_relative_to(python.parents[1])
    assert int(sources) == len(list((ROOT / "csrc").iterdir()))
    assert inside == "True"
    assert others == ["None"] * 5
    assert "kernels='auto'" in run([python, "-m", "polyfusion.info"], cwd=tmp_path)
    assert "--emulated" in run([python, "-m", "polyfusion.build", "--help"], cwd=tmp_path)


#: A plugin that leaves out all cases of a test but its first.
FIRST_CASES = """
def pytest_collection_modifyitems(items):
    firsts = {}
    for item in items:
        firsts.setdefault(item.nodeid.split("[")[0], item)
    items[:] = firsts.values()
"""


@pytest.mark.slow
def test_the_librarys_own_tests_pass_where_it_is_installed(built, python, tmp_path):
    """The tests come from the sdist, and lie where no source of the library does.

    Of each test the first case runs: a file or a requirement that is missing shows by that.
    """
    with tarfile.open(built.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("polyfusion-*")
    (unpacked / "tests").rename(tmp_path / "tests")
    shutil.rmtree(unpacked)
    (tmp_path / "first_cases.py").write_text(FIRST_CASES)
    plugins = ["-p", "no:cacheprovider", "-p", "first_cases"]
    printed = run([python, "-m", "pytest", "-m", "not slow", *plugins, "tests"], cwd=tmp_path)
    (passed,) = re.findall(r"(\d+) passed", printed)
    assert int(passed) > 100, printed[-2000:]
