"""The prepared set that the tests of the command train on."""

from pathlib import Path

import pytest

from train.prepare import prepare_synthetic


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Nine clips of nine speakers, 32×24 pixels."""
    out = tmp_path_factory.mktemp("set") / "synthetic"
    return prepare_synthetic(out, clips=9, speakers=9, seconds=0.6, size=(32, 24), workers=1)
