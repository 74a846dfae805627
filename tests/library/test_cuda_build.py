"""What can be proved of the CUDA extension without a GPU: it compiles, fits, and has no races."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from polyfusion import build
from polyfusion.build import BuildError
from polyfusion.ops import KernelsUnavailable
from tests.library.helpers import make_problem

TABLE = Path(__file__).with_name("compiled_cuda.json")
CAPABILITIES = ("80", "90", "100")
MOST_REGISTERS = 255
RENEW = "renew it: python -m polyfusion.build --resources > tests/library/compiled_cuda.json"


def need(find):
    """The path of a tool, or skip and say what is missing."""
    try:
        return find()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("POLYFUSION_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(build, "installed_path", lambda: tmp_path / "none.so")
    return tmp_path


def test_the_table_is_of_these_sources():
    """It says that no kernel spills, for any capability."""
    table = json.loads(TABLE.read_text())
    assert table.pop("sources") == build.sources_digest(), RENEW
    for kernel, by_capability in table.items():
        assert tuple(by_capability) == CAPABILITIES, kernel
        for registers, stack, spilled in by_capability.values():
            assert (stack, spilled) == (0, 0), f"{kernel} spills"
            assert registers <= MOST_REGISTERS, kernel


@pytest.mark.slow
def test_kernels_compile_without_spills():
    """For one capability: a compiler that differs from the table's shows by that."""
    need(build.find_nvcc)
    committed, found = json.loads(TABLE.read_text()), build.resources(["90"])
    assert found.keys() == committed.keys() - {"sources"}, RENEW
    for kernel, by_capability in found.items():
        registers, stack, spilled = by_capability["90"]
        assert (stack, spilled) == (0, 0), f"{kernel} spills"
        assert registers <= MOST_REGISTERS, kernel


@pytest.mark.slow
@pytest.mark.parametrize("source", ["products.cu", "final.cu"])
def test_products_run_on_tensor_cores(source, tmp_path):
    nvcc, ptx = need(build.find_nvcc), tmp_path / "kernels.ptx"
    command = [nvcc, "-arch=sm_80", "-ptx", str(build.SOURCES / source), "-o", str(ptx)]
    subprocess.run(command, check=True)
    for instruction in ("mma.sync.aligned.row.row.m16n16k16.f32.f32", "bf16.bf16", "tf32.tf32"):
        assert re.search(r"wmma\S*" + re.escape(instruction), ptx.read_text()), instruction


@pytest.mark.slow
def test_binding_compiles_for_cuda(tmp_path):
    need(build.find_compiler)
    (output,) = build.run([build.binding_step(tmp_path, emulated=False)])
    assert "warning" not in output


@pytest.mark.slow
def test_no_races(tmp_path):
    """Every kernel, emulated, under ThreadSanitizer: only barriers order the threads of a block."""
    need(build.find_compiler)
    flags = ["-O1", "-g", "-fsanitize=thread", "-Wno-tsan"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    command = [
        build.find_compiler(),
        "-fsanitize=thread",
        str(probe),
        "-o",
        str(tmp_path / "probe"),
    ]
    if (
        subprocess.run(command, capture_output=True).returncode
        or subprocess.run([tmp_path / "probe"], capture_output=True).returncode
    ):
        pytest.skip("ThreadSanitizer does not work here")
    steps = build.host_steps(tmp_path, *flags)
    program = Path(__file__).with_name("cuda_races.cpp")
    compiled = [*build.HOST_FLAGS, *flags, f"-I{build.SOURCES}", "-c", str(program)]
    target = tmp_path / "main.o"
    steps.append(build.Step(program.name, [build.find_compiler(), *compiled, "-o", str(target)]))
    build.run(steps)
    objects = [str(path) for path in tmp_path.glob("*.o")]
    checked = tmp_path / "checked"
    link = [build.find_compiler(), "-fsanitize=thread", *objects, "-o", str(checked)]
    subprocess.run(link, check=True)
    result = subprocess.run([checked], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:4000]
    assert "every kernel ran" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_both_causes_and_the_command():
    problem = make_problem("cp", dtype=torch.float32)
    with pytest.raises(KernelsUnavailable) as error:
        problem.fuse("cuda")
    message = str(error.value)
    assert "there is no CUDA device" in message
    assert "not built" in message
    assert "`python -m polyfusion.build`" in message


@pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch has CUDA")
def test_pytorch_without_cuda(cache, capsys):
    assert build.main([]) == 2
    assert "is built without CUDA" in capsys.readouterr().err
    assert not list(cache.glob("*.so"))


@pytest.mark.parametrize(
    ("missing", "message"),
    [("nvcc", "nvcc is missing"), ("g++", "C\\+\\+20 compiler is missing")],
)
def test_missing_tools(missing, message, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda _name: None)
    find = build.find_nvcc if missing == "nvcc" else build.find_compiler
    with pytest.raises(BuildError, match=message + ".*python -m polyfusion.build"):
        find()


def test_missing_headers(tmp_path, monkeypatch):
    monkeypatch.setattr(build.torch, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(BuildError, match=r"stable ABI are missing.*install torch>=2\.11"):
        build.torch_include()


def test_missing_sources(cache, monkeypatch):
    monkeypatch.setattr(build, "SOURCES", cache / "nowhere")
    assert build.find_library() is None
    with pytest.raises(BuildError, match="the sources are missing"):
        build.build(say=lambda _: None)


def test_architectures(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build.architectures() == ["80", "90", "100"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0a 12.0+PTX")
    assert build.architectures() == ["86", "90a", "120"]
    assert build.generate_code(["80", "90"])[-1] == "-gencode=arch=compute_90,code=compute_90"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(BuildError, match="contains 'Hopper'; expected capabilities such as"):
        build.architectures()


def test_a_library_is_found_whatever_architectures_are_asked_for_later(cache, monkeypatch):
    """The variable may be set where the library is built and not where it is used."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    built = build.library_path()
    built.touch()
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    assert build.find_library() == built != build.library_path()
    build.library_path().touch()
    assert build.find_library() == build.library_path()


def test_cache_key(cache, monkeypatch):
    """A library is found again only for the same PyTorch, CUDA, architectures and sources."""
    first = build.library_path()
    assert first.parent == cache
    assert build.library_path() == first
    paths = {first, build.library_path(emulated=True)}
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    paths.add(build.library_path())
    monkeypatch.setattr(build.torch, "__version__", "2.99")
    paths.add(build.library_path())
    monkeypatch.setattr(build.torch.version, "cuda", "99.0")
    paths.add(build.library_path())
    changed = cache / "norm.cu"
    changed.write_text("other")
    monkeypatch.setattr(build, "source_files", lambda: [changed])
    paths.add(build.library_path())
    assert len(paths) == 6


def test_builds_once(cache, monkeypatch):
    compiled = []

    def compile_library(output, emulated, say):
        compiled.append(output)
        output.write_text("library")

    monkeypatch.setattr(build, "compile_library", compile_library)
    threads = [threading.Thread(target=build.build, args=(True,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiled == [build.find_library(emulated=True)]


def test_a_build_that_does_not_end(cache):
    with (
        FileLock(build.library_path(emulated=True).with_suffix(".lock")),
        pytest.raises(BuildError, match=r"another build has held .* for 0 s"),
    ):
        build.build(emulated=True, timeout=0.2)


def test_a_build_that_was_killed(cache, monkeypatch):
    """Its lock does not outlive it."""
    lock = build.library_path(emulated=True).with_suffix(".lock")
    code = (
        f"import os; from filelock import FileLock; FileLock({str(lock)!r}).acquire(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert lock.exists()
    monkeypatch.setattr(build, "compile_library", lambda output, *_: output.write_text("library"))
    assert build.build(emulated=True, timeout=5) == build.find_library(emulated=True)


def test_a_compiler_error_is_shown(cache, monkeypatch):
    need(build.find_compiler)
    broken = cache / "sources"
    broken.mkdir()
    for name in (*build.KERNELS, "bindings.cpp"):
        (broken / name).write_text("not C++")
    monkeypatch.setattr(build, "SOURCES", broken)
    with pytest.raises(BuildError, match=r"does not compile: .*g\+\+"):
        build.build(emulated=True, say=lambda _: None)
    assert not list(cache.glob("*.so"))


def test_installed_library_comes_first_unless_outdated(cache, monkeypatch):
    installed = cache / "_cuda.so"
    installed.write_text("library")
    monkeypatch.setattr(build, "installed_path", lambda: installed)
    monkeypatch.setattr(build, "SOURCES", cache)
    assert build.find_library() == installed
    newer = cache / "norm.cu"
    newer.write_text("changed later")
    future = installed.stat().st_mtime + 10
    os.utime(newer, (future, future))
    monkeypatch.setattr(build, "source_files", lambda: [newer])
    assert build.find_library() is None
    monkeypatch.setattr(build, "SHIPPED", cache)  # from one wheel, in whatever order installed
    assert build.find_library() == installed


def test_nothing_is_compiled_at_import():
    code = (
        "import subprocess, sys\n"
        "def refuse(*args, **kwargs): raise SystemExit('a process was started')\n"
        "subprocess.Popen.__init__ = refuse\n"
        "import polyfusion, polyfusion.ops, polyfusion.nn\n"
        "print('polyfusion.build' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False"
