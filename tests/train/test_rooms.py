"""What imports what: a command loads the rooms that it needs."""

import pkgutil
import subprocess
import sys

import pytest

from train import data


def loaded(module: str) -> set[str]:
    """The modules of ``train`` that importing ``module`` loads."""
    code = f"import sys, {module}; print(*[m for m in sys.modules if m.startswith('train')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "command", ["train.evaluate", "train.table1.__main__", "train.syncnet", "train.prepare"]
)
def test_what_does_not_train_the_system_does_not_import_its_loop(command):
    modules = loaded(command)
    assert command in modules
    assert "train.loop" not in modules


def test_the_loop_is_what_the_training_command_loads():
    assert "train.loop" in loaded("train.__main__")


def test_data_imports_no_command():
    rooms = [f"train.data.{room.name}" for room in pkgutil.iter_modules(data.__path__)]
    modules = loaded(", ".join(rooms))
    assert modules.issuperset(rooms)
    assert modules.isdisjoint({"train.config", "train.prepare", "train.source"})


def test_the_networks_do_without_the_room_that_animates_photos():
    assert not loaded("model, model.talking_face, model.streaming")
