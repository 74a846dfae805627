"""Build the CUDA extension once, into a cache. Nothing is ever compiled at import or at a call.

    python -m polyfusion.build                 the kernels of csrc/ for this PyTorch
    python -m polyfusion.build --emulated      the same kernels as host code, to check without a GPU
    python -m polyfusion.build --resources     registers, stack and spills of every kernel, as JSON

TORCH_CUDA_ARCH_LIST chooses the architectures (default "8.0 9.0 10.0"), CUDA_HOME the toolkit, CXX
the C++ compiler, and POLYFUSION_CACHE the cache (default ~/.cache/polyfusion).
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

COMMAND = "python -m polyfusion.build"
PACKAGE = Path(__file__).resolve().parent
SHIPPED = PACKAGE / "csrc"  # where a wheel has the sources; in a clone they lie beside the package
SOURCES = SHIPPED if SHIPPED.is_dir() else PACKAGE.parent / "csrc"
KERNELS = ("hadamard.cu", "tucker.cu", "products.cu", "norm.cu", "final.cu")
ARCHITECTURES = ("80", "90", "100")
LOCK_TIMEOUT = 900.0  # seconds; a build takes about two minutes
TORCH_VERSION = "0x020b000000000000"  # the oldest PyTorch whose ABI the binary uses: 2.11
# The kernels and the emulated ones may be loaded together, so neither exports its symbols.
HIDDEN = ("-fPIC", "-fvisibility=hidden")
BINDING_FLAGS = ("-std=c++20", "-O2", *HIDDEN, f"-DTORCH_TARGET_VERSION={TORCH_VERSION}")
DEVICE_FLAGS = ("-O3", "-Xcompiler", ",".join(HIDDEN))
HOST_FLAGS = (
    "-x",
    "c++",
    "-std=c++20",
    "-O2",
    *HIDDEN,
    "-fno-strict-aliasing",
    "-Wno-unknown-pragmas",
    "-DPOLYFUSION_EMULATED",
)


class BuildError(RuntimeError):
    """The extension cannot be built here; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Step:
    """One compilation."""

    name: str
    command: list[str]


def architectures() -> list[str]:
    """Compute capabilities to build for, as "80" or "90a", from TORCH_CUDA_ARCH_LIST.

    Raises:
        BuildError: the variable names something else.
    """
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    found = []
    for item in chosen:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if not match:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST contains {item!r}; expected capabilities such as "
                "'8.0;9.0;10.0'"
            )
        found.append("".join(match.groups("")[:3]))
    return found or list(ARCHITECTURES)


def generate_code(capabilities: Sequence[str]) -> list[str]:
    """nvcc's flags: machine code for each capability, and PTX of the last for later devices."""
    flags = [f"-gencode=arch=compute_{x},code=sm_{x}" for x in capabilities]
    last = capabilities[-1]
    return [*flags, f"-gencode=arch=compute_{last},code=compute_{last}"]


def find_nvcc() -> str:
    """Path of nvcc.

    Raises:
        BuildError: there is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    for candidate in [*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"]:
        if path := shutil.which(candidate):
            return path
    raise BuildError(
        "nvcc is missing: install the CUDA toolkit, set CUDA_HOME to it if it is not on the PATH, "
        f"then run `{COMMAND}`"
    )


def find_compiler() -> str:
    """Path of the C++ compiler.

    Raises:
        BuildError: there is none.
    """
    for candidate in (os.environ.get("CXX"), "g++", "clang++"):
        if candidate and (path := shutil.which(candidate)):
            return path
    raise BuildError(f"a C++20 compiler is missing: install g++ or set CXX, then run `{COMMAND}`")


def torch_include() -> Path:
    """Directory of PyTorch's headers.

    Raises:
        BuildError: they are not installed, or older than the stable ABI.
    """
    path = Path(torch.__file__).parent / "include"
    if not (path / "torch/csrc/stable/library.h").is_file():
        raise BuildError(
            f"the headers of PyTorch's stable ABI are missing in {path}: install torch>=2.11 with "
            f"pip, then run `{COMMAND}`"
        )
    return path


def cache_directory() -> Path:
    """Where libraries are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("POLYFUSION_CACHE") or Path(base) / "polyfusion")


def source_files() -> list[Path]:
    """Everything a library depends on."""
    return sorted(p for p in SOURCES.glob("*") if p.suffix in (".cu", ".cuh", ".h", ".cpp"))


def library_path(emulated: bool = False) -> Path:
    """Where the library for these sources, this PyTorch, CUDA and architectures is, or will be."""
    built_for = "host" if emulated else "-".join(architectures())
    return cache_directory() / f"{_library_stem(emulated)}_{built_for}.so"


def _library_stem(emulated: bool) -> str:
    """How the names of libraries begin that differ in nothing but the architectures."""
    flags = HOST_FLAGS if emulated else DEVICE_FLAGS
    about = (torch.__version__, torch.version.cuda, platform.machine(), *flags, *BINDING_FLAGS)
    return f"polyfusion_{'emulated' if emulated else 'cuda'}_{sources_digest(*about)}"


def sources_digest(*about: str | None) -> str:
    """A name for the contents of :func:`source_files`, and for what else a library depends on."""
    digest = hashlib.sha256(repr(about).encode())
    for source in source_files():
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def installed_path() -> Path:
    """Where ``POLYFUSION_BUILD_CUDA=1 pip install`` puts the library."""
    return Path(__file__).with_name("_cuda.so")


def find_library(emulated: bool = False) -> Path | None:
    """A library that is built and up to date, or None.

    One that was built for the architectures asked for now comes first, then any: the variable that
    names them may be set where a library is built and not where it is used.
    """
    installed, sources = installed_path(), source_files()
    if not emulated and installed.is_file():
        if SOURCES == SHIPPED:  # both from one wheel, and an installer may have changed their times
            return installed
        newest = max((p.stat().st_mtime for p in sources), default=0.0)
        if installed.stat().st_mtime >= newest:
            return installed
    if not sources:
        return None
    others = sorted(cache_directory().glob(f"{_library_stem(emulated)}_*.so"))
    return next((path for path in [library_path(emulated), *others] if path.is_file()), None)


def device_steps(directory: Path, capabilities: Sequence[str]) -> list[Step]:
    """Compile every kernel with nvcc."""
    common = [find_nvcc(), *DEVICE_FLAGS, *generate_code(capabilities)]
    return [
        Step(name, [*common, "-c", str(SOURCES / name), "-o", str(directory / f"{name}.o")])
        for name in KERNELS
    ]


def host_steps(directory: Path, *flags: str) -> list[Step]:
    """Compile every kernel as host code."""
    common = [find_compiler(), *HOST_FLAGS, *flags]
    return [
        Step(name, [*common, "-c", str(SOURCES / name), "-o", str(directory / f"{name}.o")])
        for name in KERNELS
    ]


def binding_step(directory: Path, emulated: bool) -> Step:
    """Compile the binding."""
    define = "-DPOLYFUSION_EMULATED" if emulated else "-DUSE_CUDA"
    name = "bindings.cpp"
    source, target = str(SOURCES / name), str(directory / f"{name}.o")
    include = f"-I{torch_include()}"
    command = [find_compiler(), *BINDING_FLAGS, define, include, "-c", source, "-o", target]
    return Step(name, command)


def link_step(directory: Path, output: Path, emulated: bool) -> Step:
    """Link the objects. PyTorch's own libraries are loaded already when this one is."""
    objects = [str(directory / f"{name}.o") for name in (*KERNELS, "bindings.cpp")]
    torch_libraries = [f"-L{torch_include().parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    if emulated:
        command = [find_compiler(), "-shared", *objects, *torch_libraries, "-o", str(output)]
    else:
        more = ["-ltorch_cuda", "-cudart", "static"]
        command = [find_nvcc(), "-shared", *objects, *torch_libraries, *more, "-o", str(output)]
    return Step(output.name, command)


def run(steps: Sequence[Step], say: Callable[[str], None] = lambda _: None) -> list[str]:
    """Run steps, as many at a time as there are cores; return what each printed.

    Raises:
        BuildError: a compiler failed; the message has its output.
    """
    begin, done = time.monotonic(), 0

    def one(step: Step) -> str:
        nonlocal done
        result = subprocess.run(step.command, capture_output=True, text=True)
        if result.returncode:
            output = (result.stdout + result.stderr).strip()[-4000:]
            raise BuildError(f"{step.name} does not compile: {' '.join(step.command)}\n{output}")
        done += 1
        say(f"[{done}/{len(steps)}] {step.name}, {time.monotonic() - begin:.0f} s")
        return result.stdout + result.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, steps))


def compile_library(output: Path, emulated: bool, say: Callable[[str], None]) -> None:
    """Compile and link into ``output``, which appears whole or not at all.

    Raises:
        BuildError: something is missing or does not compile.
    """
    if not source_files():
        raise BuildError(
            f"the sources are missing in {SOURCES}: install polyfusion again, or build from a clone"
        )
    if not emulated and torch.version.cuda is None:
        raise BuildError(
            f"PyTorch {torch.__version__} is built without CUDA: install one with CUDA, "
            f"then run `{COMMAND}`"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        directory = Path(temporary)
        kernels = host_steps(directory) if emulated else device_steps(directory, architectures())
        run([*kernels, binding_step(directory, emulated)], say)
        linked = directory / output.name
        run([link_step(directory, linked, emulated)])
        os.replace(linked, output)


def build(
    emulated: bool = False, say: Callable[[str], None] = print, timeout: float = LOCK_TIMEOUT
) -> Path:
    """Build the library unless it is built already, and return its path.

    Builds exclude each other by a lock that the system frees when its holder dies.

    Raises:
        BuildError: something is missing, does not compile, or another build does not end.
    """
    from filelock import FileLock, Timeout  # a requirement of PyTorch's

    path = library_path(emulated)
    if (found := find_library(emulated)) in (path, installed_path()):
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    try:
        with FileLock(lock, timeout=timeout):
            if not path.is_file():
                compile_library(path, emulated, say)
    except Timeout:
        raise BuildError(
            f"another build has held {lock} for {timeout:.0f} s: wait for it or stop it, "
            f"then run `{COMMAND}`"
        ) from None
    return path


def resources(capabilities: Sequence[str] = ARCHITECTURES) -> dict[str, dict[str, list[int]]]:
    """What ptxas says of every kernel: {kernel: {capability: [registers, stack, spilled bytes]}}.

    Shared memory is not in it: every kernel's is chosen at launch.
    """
    table: dict[str, dict[str, list[int]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        steps = [
            Step(f"{capability} {step.name}", [*step.command[:-1], os.devnull, "-Xptxas", "-v"])
            for capability in capabilities
            for step in device_steps(Path(temporary), [capability])
        ]
        for step in steps:
            step.command[:] = [x for x in step.command if ",code=compute_" not in x]
        for step, output in zip(steps, run(steps), strict=True):
            for kernel, numbers in _parse_resources(output).items():
                table.setdefault(kernel, {})[step.name.split()[0]] = numbers
    return dict(sorted(table.items()))


def _parse_resources(output: str) -> dict[str, list[int]]:
    names = re.findall(r"Compiling entry function '(\w+)'", output)
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", output)
    registers = re.findall(r"Used (\d+) registers", output)
    rows = zip(_demangle(names), registers, stacks, strict=True)
    return {name: [int(used), int(stack), int(spilled)] for name, used, (stack, spilled) in rows}


def _demangle(names: Sequence[str]) -> list[str]:
    """Short names such as norm_apply_kernel<__half, true>."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    text = re.sub(r"\(anonymous namespace\)::|polyfusion::|void ", "", text)
    return [re.sub(r" ?>$", ">", line.split("(")[0]) for line in text.splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--emulated",
        action="store_true",
        help="build host code, to check the kernels without a GPU",
    )
    parser.add_argument(
        "--resources", action="store_true", help="print every kernel's registers, stack and spills"
    )
    options = parser.parse_args(arguments)
    try:
        if options.resources:
            table = {"sources": sources_digest(), **resources()}
            rows = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in table.items()]
            print("{\n" + ",\n".join(rows) + "\n}")
        else:
            print(build(options.emulated))
    except BuildError as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
