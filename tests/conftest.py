"""One thread a process, and fixtures of all tests."""

import os
from pathlib import Path

# pytest -n runs one process a core; those that tests start have one thread each, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


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
