"""One thread a process, and fixtures of all tests."""

import os
from pathlib import Path

# pytest -n runs one process a core; those that tests start have one thread each, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU from all tests but those of ``-m gpu``.

    The others are the same on every machine: they run the Triton kernels on CPU tensors in the
    interpreter, which is there only without a GPU.
    """
    if "gpu" not in config.getoption("markexpr").split():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def fp32_precision():
    """What sets both of PyTorch's switches for products of float32; they are put back afterwards.

    It takes ``"ieee"`` or ``"tf32"``, and for convolutions another one if that is given.
    """
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]

    def set_to(products: str, convolutions: str | None = None) -> None:
        for switch, precision in zip(switches, (products, convolutions or products), strict=True):
            switch.fp32_precision = precision

    yield set_to
    set_to(*before)


@pytest.fixture
def poisoned_memory():
    """Fill fresh memory with NaN, so that an output that a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def grid_dir() -> Path:
    """Raw clips of the GRID corpus, from $POLYFUSION_GRID or beside the repository."""
    beside = Path(__file__).parents[2] / "shared" / "grid-speakers"
    path = Path(os.environ.get("POLYFUSION_GRID", beside))
    if not path.is_dir():
        pytest.skip(f"no GRID clips in {path}; set POLYFUSION_GRID")
    return path
