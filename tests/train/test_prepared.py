"""Prepared clips: the file, the manifest and the dataset that crops them."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from train.data.prepared import Clip, DataError, PreparedSet, read_clip, read_header, write_clip

RATE, STRIDE = 16000, 640


def make_clip(name="a", speaker="s1", frames=10, samples=None, size=(8, 6), seed=0, **truth):
    """Frame t has the value t in its first pixel; sample i has the value i / 32768."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (frames, 3, *size), dtype=np.uint8)
    pictures[:, :, 0, 0] = np.arange(frames)[:, None]
    audio = np.arange(frames * STRIDE if samples is None else samples, dtype=np.float32) / 32768
    return Clip(pictures, audio, 25.0, RATE, speaker, name, truth)


def make_set(root, clips, **changes):
    entries = []
    for clip, split in clips:
        path = root / "clips" / clip.speaker / f"{clip.name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, clip)
        entries.append(
            {
                "name": clip.name,
                "speaker": clip.speaker,
                "split": split,
                "file": path.relative_to(root).as_posix(),
                "frames": len(clip.frames),
                "samples": len(clip.audio),
            }
        )
    manifest = {"version": 1, "source": "grid", "fps": 25, "sample_rate": RATE, "size": [8, 6]}
    manifest |= {"clips": entries, "skipped": []} | changes
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


@pytest.fixture
def small_set(tmp_path):
    clips = [(make_clip(f"c{i}", f"s{i % 3}", 9 + i, seed=i), "train") for i in range(6)]
    return make_set(tmp_path, [*clips, (make_clip("v", "s9", 30), "val")])


def test_clip_round_trip(tmp_path):
    truth = {"openness": np.linspace(0, 1, 10), "blinks": np.zeros((0, 2), np.float32)}
    clip = make_clip(**truth)
    write_clip(tmp_path / "a.safetensors", clip, remarks=["by hand"])
    back = read_clip(tmp_path / "a.safetensors")
    assert (back.fps, back.sample_rate, back.speaker, back.name) == (25.0, RATE, "s1", "a")
    np.testing.assert_array_equal(back.frames, clip.frames)
    np.testing.assert_array_equal(back.audio, clip.audio)
    assert back.audio.dtype == np.float32
    assert back.truth.keys() == truth.keys()
    for key, value in truth.items():
        np.testing.assert_array_equal(back.truth[key], value)
    header = read_header(tmp_path / "a.safetensors")
    assert (header["frames"], header["samples"], header["size"]) == (10, 6400, [8, 6])
    assert header["remarks"] == ["by hand"]


def test_equal_clips_make_equal_files_and_loud_sound_is_clipped(tmp_path):
    clip = make_clip()
    clip.audio[:2] = [3.0, -3.0]
    for name in "ab":
        write_clip(tmp_path / name, clip)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    np.testing.assert_allclose(read_clip(tmp_path / "a").audio[:2], [1, -1], atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"frames": np.zeros((2, 8, 6, 3), np.uint8)},
        {"frames": np.zeros((2, 3, 8, 6), np.float32)},
        {"audio": np.zeros((2, 100), np.float32)},
        {"audio": np.full(100, np.nan, np.float32)},
    ],
)
def test_unsuitable_clip_leaves_no_file(tmp_path, change):
    clip = Clip(**{**make_clip().__dict__, **change})
    with pytest.raises(DataError, match="clip a: "):
        write_clip(tmp_path / "a", clip)
    assert not os.listdir(tmp_path)


def test_failed_write_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_clip(tmp_path / "a", make_clip())
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign", "missing"])
def test_unreadable_clip_is_one_line(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    write_clip(path, make_clip())
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("no tensors here, only words")
    elif damage == "foreign":
        save_file({"weight": np.zeros(3)}, path)
    else:
        path.unlink()
    with pytest.raises(DataError, match=r"a\.safetensors") as caught:
        read_clip(path)
    assert "\n" not in str(caught.value)


def test_items_are_crops_of_the_clip_with_their_sound(small_set):
    data = PreparedSet(small_set, frames=4, random_crop=True, seed=3)
    assert (data.fps, data.sample_rate, data.window_stride, data.size) == (25, RATE, 640, (8, 6))
    assert data.speakers == ["s0", "s1", "s2"]
    starts = set()
    for epoch in range(20):
        for index in range(len(data)):
            item = data[epoch * len(data) + index]
            whole, start = data.clip(index), int(item["frames"][0, 0, 0, 0])
            starts.add(start)
            assert item["index"] == index
            assert item["audio"].dtype == torch.float32
            np.testing.assert_array_equal(item["frames"], whole.frames[start : start + 4])
            samples = slice(start * STRIDE, (start + 4) * STRIDE)
            np.testing.assert_array_equal(item["audio"], whole.audio[samples])
    assert starts == set(range(14 - 4 + 1))  # all positions, the last included


def test_crop_without_randomness_starts_at_the_first_frame(small_set):
    assert all(int(item["frames"][0, 0, 0, 0]) == 0 for item in PreparedSet(small_set, frames=5))


def test_short_sound_is_padded_with_silence(tmp_path):
    make_set(tmp_path, [(make_clip(samples=5 * STRIDE + 7), "train")])
    audio = PreparedSet(tmp_path, frames=10)[0]["audio"]
    assert audio.shape == (10 * STRIDE,)
    assert audio[5 * STRIDE + 6] > 0
    assert not audio[5 * STRIDE + 7 :].any()
    make_set(tmp_path, [(make_clip(samples=0), "train")])
    with pytest.raises(DataError, match=r"clips\[0\]\.samples is 0, expected a whole number of"):
        PreparedSet(tmp_path)


def test_randomness_depends_on_seed_epoch_and_index_only(small_set):
    def draw(seed, epoch):
        data = PreparedSet(small_set, frames=4, random_crop=True, mirror=True, seed=seed)
        return torch.stack([data[epoch * 6 + i]["frames"] for i in reversed(range(6))])

    assert torch.equal(draw(0, 1), draw(0, 1))
    assert not torch.equal(draw(0, 1), draw(0, 2))
    assert not torch.equal(draw(0, 1), draw(1, 1))
    data = PreparedSet(small_set, frames=4, random_crop=True, mirror=True)
    assert data[3 * 6 + 2]["index"] == 2


def test_mirror_flips_half_of_the_items(small_set):
    data = PreparedSet(small_set, mirror=True)
    flipped = 0
    for epoch in range(40):
        for item in (data[epoch * 6 + i] for i in range(6)):
            frames = data.clip(item["index"]).frames
            mirrored = np.array_equal(item["frames"], frames[..., ::-1])
            assert mirrored != np.array_equal(item["frames"], frames)
            flipped += mirrored
    assert 90 < flipped < 150


def test_reduced_size_is_the_area_mean(small_set):
    data = PreparedSet(small_set, size=(4, 3))
    mean = data.clip(0).frames.reshape(9, 3, 4, 2, 3, 2).mean(axis=(3, 5))
    assert data[0]["frames"].shape == (9, 3, 4, 3)
    assert np.abs(data[0]["frames"].numpy() - mean).max() <= 0.51


def test_short_clips_are_left_out_and_counted(small_set):
    data = PreparedSet(small_set, frames=12)
    assert [clip["frames"] for clip in data.clips] == [12, 13, 14]
    assert data.skipped == 3
    assert len(PreparedSet(small_set, frames=12, limit=2)) == 2
    assert len(PreparedSet(small_set, split=None)) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "no split 'test'; it has train, val"),
        ({"frames": 31, "split": "val"}, "longest has 30"),
        ({"frames": 0}, "frames must be at least 1"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"size": (16, 12)}, "8 x 6 and cannot give 16 x 12.*--size 16 12"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_unsuitable_options_are_one_line(small_set, options, message):
    with pytest.raises(DataError, match=message):
        PreparedSet(small_set, **options)


def _remove_key(root):
    manifest = json.loads((root / "manifest.json").read_text())
    del manifest["clips"][1]["frames"]
    (root / "manifest.json").write_text(json.dumps(manifest))


def _change(root, clip=None, **values):
    """Set fields of the manifest, or of one of its clips."""
    manifest = json.loads((root / "manifest.json").read_text())
    (manifest if clip is None else manifest["clips"][clip]).update(values)
    (root / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("clip", "values", "message"),
    [
        (None, {"clips": None}, "clips is null, expected a list"),
        (None, {"fps": 0}, "fps is 0, expected a number above 0"),
        (None, {"fps": "25"}, 'fps is "25", expected a number above 0'),
        (None, {"fps": float("nan")}, "fps is NaN, expected a number above 0"),
        (None, {"sample_rate": True}, "sample_rate is true, expected a whole number"),
        (None, {"size": [8]}, r"size is \[8\], expected a list of 2"),
        (None, {"settings": []}, r"settings is \[\], expected an object"),
        (None, {"clips": [None]}, r"clips\[0\] is null, expected an object"),
        (2, {"frames": "many"}, r'clips\[2\]\.frames is "many", expected a whole number'),
        (2, {"samples": 0}, r"clips\[2\]\.samples is 0, expected a whole number of at least 1"),
        (2, {"split": 3}, r"clips\[2\]\.split is 3, expected one of train, val, test"),
        (2, {"speaker": "../../x"}, r'clips\[2\]\.speaker is "\.\./\.\./x", expected a name'),
        (2, {"speaker": ".."}, r"clips\[2\]\.speaker"),
        (2, {"name": "/etc/x"}, r"clips\[2\]\.name"),
        (2, {"file": "/etc/x"}, r"clips\[2\]\.file is /etc/x, expected a file inside"),
        (2, {"file": "clips/../../x"}, r"clips\[2\]\.file"),
        (2, {"file": "folder/c2.safetensors"}, r"clips\[2\]\.file"),
        (2, {"file": "link.safetensors"}, r"clips\[2\]\.file"),
    ],
)
def test_what_a_manifest_may_not_say_is_named(small_set, clip, values, message):
    elsewhere = small_set.parent / f"{small_set.name}-elsewhere"
    shutil.copytree(small_set / "clips" / "s2", elsewhere)
    (small_set / "folder").symlink_to(elsewhere)
    (small_set / "link.safetensors").symlink_to(elsewhere / "c2.safetensors")
    _change(small_set, clip, **values)
    with pytest.raises(DataError, match=f"manifest.json: {message}") as caught:
        PreparedSet(small_set)
    assert "\n" not in str(caught.value)


def test_a_set_may_be_reached_through_links_and_dots(small_set, monkeypatch):
    (small_set / "again").symlink_to(small_set)
    (small_set / "link.safetensors").symlink_to(small_set / "clips/s2/c2.safetensors")
    _change(small_set, 2, file="link.safetensors")
    monkeypatch.chdir(small_set / "clips")
    assert len(PreparedSet("../again")) == 6


@pytest.mark.parametrize("read", [lambda data: data[0], lambda data: data.clip(0)])
@pytest.mark.parametrize("same_person", [True, False])
def test_two_swapped_clips_are_found(tmp_path, read, same_person):
    # of the same name as when two sets were mixed up: only the frames differ
    clips = [make_clip("c", "s0" if same_person else f"s{i}", seed=i) for i in range(2)]
    first, second = (make_set(tmp_path / str(i), [(c, "train")]) for i, c in enumerate(clips))
    for root in (first, second):
        path = next((root / "clips").rglob("*.safetensors"))
        _change(root, 0, checksum=read_header(path)["checksum"])
        read(PreparedSet(root))
    paths = [next((root / "clips").rglob("*.safetensors")) for root in (first, second)]
    shutil.copy(paths[1], paths[0])
    data = PreparedSet(first)
    with pytest.raises(DataError, match="checksum differs" if same_person else "speaker is s1"):
        read(data)


def test_a_flipped_bit_is_found_when_a_clip_is_first_read(small_set):
    path = small_set / "clips/s0/c0.safetensors"
    content = bytearray(path.read_bytes())
    content[-50] ^= 16
    path.write_bytes(content)
    data = PreparedSet(small_set, frames=2)
    with pytest.raises(DataError, match=r"c0\.safetensors is not .* is damaged"):
        data[0]
    assert read_header(path)["frames"] == 9


def test_a_truth_that_is_not_finite_is_named(tmp_path):
    make_set(tmp_path, [(make_clip(eye_openness=np.full(10, np.nan, np.float32)), "train")])
    with pytest.raises(DataError, match=r"truth\.eye_openness has a value that is not finite"):
        PreparedSet(tmp_path)[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist; make it with: python -m train.prepare grid RAW"),
        (lambda root: (root / "manifest.json").unlink(), "no manifest.json.*train.prepare"),
        (lambda root: (root / "manifest.json").write_text("{"), "cannot read .*manifest.json"),
        (lambda root: (root / "manifest.json").write_text("[]"), "version None, expected 1"),
        (lambda root: (root / "manifest.json").write_text('{"version": 2}'), "version 2"),
        (_remove_key, "lacks frames"),
        (lambda root: (root / "clips/s1/c1.safetensors").unlink(), "c1.safetensors is missing"),
    ],
)
def test_damaged_set_is_one_line(small_set, damage, message):
    damage(small_set)
    with pytest.raises(DataError, match=message) as caught:
        PreparedSet(small_set)
    assert "\n" not in str(caught.value)


def test_root_that_is_a_file_and_clip_cut_short(small_set):
    with pytest.raises(DataError, match="is not a directory"):
        PreparedSet(small_set / "manifest.json")
    data = PreparedSet(small_set)
    path = small_set / data.clips[0]["file"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="delete it and prepare again"):
        data[0]


def test_loader_workers_give_the_same_batches(small_set):
    data = PreparedSet(small_set, frames=4, random_crop=True, mirror=True)
    loader = torch.utils.data.DataLoader(
        data, batch_size=3, num_workers=2, multiprocessing_context="fork"
    )
    frames = torch.cat([batch["frames"] for batch in loader])
    assert torch.equal(frames, torch.stack([item["frames"] for item in data]))
