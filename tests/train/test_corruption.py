"""Every kind of file damaged at random offsets: an error by name, or what was read before.

POLYFUSION_DAMAGES sets how many damages each kind of file gets; the default is for CI.
"""

import json
import os
import random
import shutil
from pathlib import Path

import torch

from tests.train.helpers import CONFIG, batch, trainer
from train.config import load_config
from train.data.prepared import PreparedSet, read_clip, read_manifest
from train.errors import UserError
from train.files import write_json
from train.metrics.weights import load_network, save_network
from train.run.checkpoint import CHECKPOINT_FILE, read_checkpoint, save_checkpoint
from train.run.directory import read_metrics

DAMAGES = int(os.environ.get("POLYFUSION_DAMAGES", "40"))


def flip(content: bytearray, at: int, rng: random.Random) -> None:
    content[at] ^= 1 << rng.randrange(8)


def overwrite(content: bytearray, at: int, rng: random.Random) -> None:
    content[at : at + 16] = rng.randbytes(len(content[at : at + 16]))


def clear(content: bytearray, at: int, rng: random.Random) -> None:
    content[at : at + 4096] = bytes(len(content[at : at + 4096]))


def cut(content: bytearray, at: int, rng: random.Random) -> None:
    del content[at:]


def insert(content: bytearray, at: int, rng: random.Random) -> None:
    content[at:at] = rng.randbytes(3)


DAMAGE = (flip, overwrite, clear, cut, insert)


def same(one, other) -> bool:
    """Whether two results are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return one == other


def check(path: Path, read, seed: int, header: int = 0, *, exact: bool = True) -> None:
    """Damage ``path`` in many ways; half of them in its first ``header`` bytes."""
    rng = random.Random(seed)
    good, expected = path.read_bytes(), read()
    assert same(read(), expected)
    refused = 0
    for number in range(DAMAGES):
        content = bytearray(good)
        change = DAMAGE[number % len(DAMAGE)]
        end = header if header and number % 2 else len(good)
        change(content, rng.randrange(end), rng)
        path.write_bytes(content)
        try:
            found, told = read(), None
        except UserError as error:
            found, told = expected, str(error)
        assert told is None or (path.name in told and len(told.splitlines()) == 1)
        assert not exact or same(found, expected), (change.__name__, number)
        refused += told is not None
    path.write_bytes(good)
    assert refused >= DAMAGES / 3


def header_of(path: Path) -> int:
    """The length of a safetensors file's header."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_checkpoints(tmp_path):
    made = trainer()
    made.step(batch(), torch.Generator().manual_seed(0))
    path = tmp_path / CHECKPOINT_FILE
    save_checkpoint(path, made.modules, made.optimizers, {"step": 1, "config": CONFIG.to_dict()})

    def read():
        tensors, info = read_checkpoint(path)
        return {**tensors, "info": info}

    check(path, read, 1, header_of(path))


def test_measuring_networks(tmp_path):
    path = tmp_path / "network.safetensors"
    save_network(path, "a", torch.nn.Linear(50, 30), {"of": "text"})

    def read():
        network = torch.nn.Linear(50, 30)
        info = load_network(path, "a", network, "a command")
        return {**info, **network.state_dict()}

    check(path, read, 2, header_of(path))


def test_clips(data, tmp_path):
    root = shutil.copytree(data, tmp_path / "set")
    path = root / PreparedSet(root).clips[0]["file"]

    def read():
        clip = read_clip(path)
        arrays = {"frames": clip.frames, "audio": clip.audio, **clip.truth}
        values = {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}
        return {**values, "told": (clip.fps, clip.sample_rate, clip.speaker, clip.name)}

    check(path, read, 3, header_of(path))
    check(path, lambda: PreparedSet(root, frames=3)[0], 4, header_of(path))


def test_texts_that_people_may_edit(data, tmp_path):
    """Another valid value is not told from an edit; anything else is refused by name."""
    write_json(tmp_path / "config.json", CONFIG.to_dict())
    check(tmp_path / "config.json", lambda: load_config(tmp_path), 5, exact=False)
    lines = [{"step": step, "loss/l1": 1 / (step + 1)} for step in range(50)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    check(path, lambda: read_metrics(tmp_path), 6, exact=False)
    root = shutil.copytree(data, tmp_path / "set")
    check(root / "manifest.json", lambda: read_manifest(root), 7, exact=False)
