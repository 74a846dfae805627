"""Which kernels serve a call, and what is said when they cannot."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from polyfusion import dispatch, extension, info, ops
from polyfusion.dispatch import DTYPES, KernelsUnavailable, resolve
from tests.library.helpers import FORMS, make_problem

CPU = [torch.zeros(1)]


def run(code: str, interpret: str | None) -> str:
    """What a fresh interpreter without a GPU prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    if interpret is not None:
        environment["TRITON_INTERPRET"] = interpret
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    return done.stdout + done.stderr


def test_auto_is_eager_on_cpu():
    assert resolve("auto", CPU) == "eager"
    assert resolve("eager", CPU) == "eager"


def test_unknown_choice():
    with pytest.raises(ValueError, match="kernels='fast': expected one of 'auto', 'eager'"):
        resolve("fast", CPU)


def test_unsupported_call():
    assert resolve("auto", CPU, unsupported="too odd") == "eager"
    with pytest.raises(KernelsUnavailable, match="kernels='triton': too odd"):
        resolve("triton", CPU, unsupported="too odd")


def test_no_interpreter_when_asked_not_to():
    code = (
        "import torch, polyfusion\n"
        "from polyfusion.dispatch import triton_problem\n"
        "print(triton_problem())"
    )
    assert "set TRITON_INTERPRET=1" in run(code, "0")
    assert run(code, None).strip() == "None"


@pytest.fixture
def a_gpu(monkeypatch):
    """What is found out about kernels when there is a GPU, and again when it is gone."""
    dispatch._find_triton_problem.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    launched = []
    monkeypatch.setattr(
        dispatch, "backend", lambda *name: SimpleNamespace(launch=lambda: launched.append(name))
    )
    yield launched
    dispatch._find_triton_problem.cache_clear()


def test_a_gpu_is_tried_once(a_gpu):
    assert dispatch.triton_problem() is None
    assert dispatch.triton_problem() is None
    assert a_gpu == [("triton", "trial")]


def test_no_interpreter_on_a_gpu(a_gpu, monkeypatch):
    """A variable that was left over from a test would make every step a thousand times slower."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET=1 would interpret the kernels; unset it" in dispatch.triton_problem()
    assert not a_gpu


def test_a_failed_trial_falls_back(a_gpu, monkeypatch):
    def launch():
        raise RuntimeError("running the launcher:\nfatal error: Python.h: No such file")

    monkeypatch.setattr(dispatch, "backend", lambda *name: SimpleNamespace(launch=launch))
    problem = dispatch.triton_problem()
    assert "RuntimeError: fatal error: Python.h: No such file" in problem
    assert "it needs a C compiler and Python's headers" in problem
    on_gpu = [SimpleNamespace(device=torch.device("cuda"), is_cuda=True, dtype=torch.float32)]
    assert resolve("auto", on_gpu) == "eager"
    with pytest.raises(KernelsUnavailable, match="fatal error"):
        resolve("triton", on_gpu)
    monkeypatch.setattr(extension, "problem", lambda tensors: None)  # built, and it runs here
    assert resolve("auto", on_gpu) == "cuda"
    assert dispatch.why_eager(on_gpu[0]) is None


def test_an_extension_for_another_gpu_is_refused(monkeypatch):
    def launch():
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(extension.build, "find_library", lambda emulated: Path("built.so"))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(extension, "_try", launch)
    extension._load.cache_clear()
    try:
        assert "built.so failed: CUDA error: no kernel image is available; build it for" in (
            extension.problem() or ""
        )
    finally:
        extension._load.cache_clear()


#: Our kernel runs interpreted and another's kernel is still there to be compiled, Triton's own
#: functions with it; children would see the environment that this process was given.
FOREIGN = """
import os, {first}
import torch, triton, triton.language as tl
import torch._dynamo  # PyTorch's own, which sets a variable
from polyfusion import nn
before = dict(os.environ)
@triton.jit
def theirs(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), tl.zeros([SIZE], tl.float32) + tl.sum(tl.arange(0, SIZE)))
x, w = torch.randn(2, 3, 4), torch.randn(2, 4)
layer = nn.CPFusion((4, 4), 5, rank=2)
layer.kernels = "eager"
expected = layer(x, w)
layer.kernels = "triton"
torch.testing.assert_close(layer(x, w), expected)
assert dict(os.environ) == before and "TRITON_INTERPRET" not in before
from triton.backends.compiler import GPUTarget
source = triton.compiler.ASTSource(theirs, {{"x": "*fp32"}}, {{"SIZE": 16}})
print("compiled", len(triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]) > 100)
"""


@pytest.mark.parametrize("first", ["triton", "polyfusion"])
def test_nothing_outside_the_package_changes(first, tmp_path):
    script = tmp_path / "theirs.py"  # Triton reads the kernel's source
    script.write_text(FOREIGN.format(first=first))
    assert "compiled True" in run(f"import runpy; runpy.run_path({str(script)!r})", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("form", FORMS)
def test_fused_choice_is_taken(form, monkeypatch):
    """An explicit choice reaches the fused operator and says once that it is interpreted."""
    from polyfusion.kernels.triton import common

    launched = []
    original = common.launch
    for module in ("hadamard", "tucker", "matmul"):
        monkeypatch.setattr(
            f"polyfusion.kernels.triton.{module}.launch",
            lambda kernel, *args, **kw: launched.append(kernel) or original(kernel, *args, **kw),
        )
    problem = make_problem(form)
    problem.fuse("eager")
    assert not launched
    problem.fuse("triton")
    forward = len(launched)
    assert forward == (2 if form == "tucker" else 1)
    problem.gradients("triton", torch.ones(2, 3, 21, dtype=torch.double))
    assert len(launched) - 2 * forward == (4 if form == "tucker" else 2)


def test_info():
    """The report names every operator with what ``auto`` means for it here, and why."""
    report = info.lines()
    operators = {name for name in ops.__all__ if name.endswith(("_fusion", "_block"))}
    assert {*info.FUSED, *info.EAGER_ONLY} == operators | {"norm_activation"}
    for operator in info.FUSED:
        line = next(x for x in report if x.split()[:1] == [operator])
        assert len(line.split()) == 1 + len(info.DTYPES) == 1 + len(DTYPES)
        assert set(line.split()[1:]) <= {"eager", "triton", "cuda"}
    for operator in info.EAGER_ONLY:
        assert any(x.split()[:2] == [operator, "eager"] for x in report)
    assert any("kernels='cuda'" in line for line in report)
    if not torch.cuda.is_available():
        why = report[report.index("Why:") + 1]
        assert why == (
            "  float32, bfloat16, float16, float64: on cpu PyTorch is faster, "
            "the interpreter is for checking"
        )
        layers = [x.split() for x in report if " channels on " in x]
        methods = [x[5] for x in layers]
        assert methods == ["taps"] * 2 + ["library"] * 7
        assert max(map(len, report)) < 125
