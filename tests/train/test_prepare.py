"""``python -m train.prepare`` on real clips of GRID, broken ones, hostile arguments and stops."""

import functools
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from train import prepare
from train.data import grid
from train.data.media import write_video
from train.data.prepared import DataError, PreparedSet, read_clip
from train.data.splits import SPLITS, draw_splits
from train.jobs import DIED, Job, JobFailed, run_jobs
from train.prepare import prepare_grid, prepare_synthetic

GRID = Path(
    os.environ.get("POLYFUSION_GRID") or Path(__file__).parents[3] / "shared" / "grid-speakers"
)
needs_grid = pytest.mark.skipif(not GRID.is_dir(), reason=f"no GRID clips at {GRID}")
REAL = ["s1/bbir6n.mpg", "s2/pwij3p.mpg", "s20/brbk7n.mpg"]
RATE = 16000


def command(monkeypatch, *args):
    """Run ``python -m train.prepare ARGS`` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, args)])
    try:
        return prepare.main()
    except SystemExit as stop:  # tyro's own usage errors
        return stop.code


def test_finds_clips_in_every_layout(tmp_path):
    layout = {
        "s1/aaaa.mpg": "s1",
        "s2/video/bbbb.mpg": "s2",
        "s10/video/mpg_6000/cccc.MPG": "s10",
        "deep/er/s3/dddd.mpg": "s3",
        "myself/eeee.mp4": "myself",
    }
    for path in [*layout, "s1/aaaa.align", "readme.txt"]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    found = grid.find_clips(tmp_path)
    assert {str(s.path.relative_to(tmp_path)): s.speaker for s in found} == layout
    assert [source.speaker for source in found] == ["s3", "myself", "s1", "s2", "s10"]
    assert [source.speaker for source in grid.find_clips(tmp_path / "s1")] == ["s1"]


def clips_of(counts):
    return [(f"s{i}", f"c{j}") for i, count in enumerate(counts) for j in range(count)]


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [([5] * 33, (16, 7, 10)), ([1, 40, *[1] * 6], (4, 2, 2)), ([2, 2, 2], (1, 1, 1))],
)
def test_speakers_are_split_whole(counts, sizes):
    clips = clips_of(counts)
    for seed in range(5):
        splits = draw_splits(clips, seed)
        assert splits == draw_splits(clips[::-1], seed)
        speakers = {split: {s for (s, _), v in splits.items() if v == split} for split in SPLITS}
        assert tuple(map(len, speakers.values())) == sizes
        assert sum(sizes) == len(counts)
        assert f"s{int(np.argmax(counts))}" in speakers["train"] or len(set(counts)) == 1
    assert splits != draw_splits(clips, 0)


@pytest.mark.parametrize(("counts", "sizes"), [([33], (16, 7, 10)), ([2, 1], (1, 1, 1))])
def test_clips_of_one_or_two_speakers_are_split(counts, sizes):
    values = list(draw_splits(clips_of(counts), 0).values())
    assert tuple(values.count(split) for split in SPLITS) == sizes
    assert set(draw_splits(clips_of([1]), 0).values()) == {"train"}


@pytest.fixture
def corpus(tmp_path):
    """Two real clips, one of them nested, and six broken ones."""
    raw = tmp_path / "raw"
    for clip, place in zip(REAL[:2], ["s1", "s2/video"], strict=True):
        (raw / place).mkdir(parents=True)
        shutil.copy(GRID / clip, raw / place)
    bad = raw / "s4"
    bad.mkdir()
    (bad / "empty.mpg").touch()
    (bad / "text.mpg").write_text("this is not a video")
    data = (GRID / REAL[0]).read_bytes()
    (bad / "cut.mpg").write_bytes(data[: len(data) // 2])
    flat = np.full((75, 48, 64, 3), 128, np.uint8)
    write_video(bad / "faceless.mpg", flat, 25, np.zeros(3 * RATE, np.float32), RATE)
    write_video(bad / "silent.mpg", flat, 25)
    write_video(bad / "fast.mpg", flat, 30, np.zeros(int(2.5 * RATE), np.float32), RATE)
    shutil.copy(GRID / REAL[0], raw / "s1" / "bbir6n.mpeg")
    return raw


REASONS = {
    "empty.mpg": "zero bytes",
    "text.mpg": "cannot be decoded",
    "cut.mpg": "fewer than 75 (truncated?)",
    "faceless.mpg": "no face found",
    "silent.mpg": "no audio stream",
    "fast.mpg": "30 fps, the set 25",
    "bbir6n.mpg": "the same clip as",
}


@needs_grid
def test_broken_clips_are_named_and_the_rest_is_prepared(corpus, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert command(monkeypatch, "grid", corpus, out, "--workers", "1") == 0
    printed = capsys.readouterr().out
    skipped = [line for line in printed.splitlines() if line.startswith("  ")]
    assert len(skipped) == len(REASONS)
    for name, reason in REASONS.items():
        assert any(name in line and reason in line for line in skipped), name
    assert (out / "contact.png").stat().st_size > 1000
    data = PreparedSet(out, split=None, frames=75)
    assert [(clip["speaker"], clip["name"]) for clip in data.clips] == [
        ("s1", "bbir6n"),
        ("s2", "pwij3p"),
    ]
    assert data[0]["frames"].shape == (75, 3, 128, 96)
    assert data[0]["audio"].shape == (48000,)

    first, second = (out / clip["file"] for clip in data.clips)
    first.write_bytes(first.read_bytes()[:1000])
    intact = second.stat().st_mtime_ns
    assert command(monkeypatch, "grid", corpus, out, "--workers", "1") == 0
    assert "(1 were there before)" in capsys.readouterr().out
    assert second.stat().st_mtime_ns == intact
    assert len(read_clip(first).frames) == 75


@needs_grid
def test_names_and_copies_of_every_kind(tmp_path, monkeypatch, capsys):
    raw, good = tmp_path / "raw" / "s1", GRID / REAL[0]
    raw.mkdir(parents=True)
    latin = os.fsdecode(b"caf\xe9")
    for name in (f"{latin}.mpg", f"{'l' * 240}.mpg", f"{'t' * 251}.mpg", "twice.mpg"):
        shutil.copy(good, raw / name)
    (raw / "twice.mpeg").touch()
    (raw / f"broken-{latin}.mpg").touch()
    out = tmp_path / "out"
    args = ["grid", tmp_path / "raw", out, "--workers", "1", "--size", "32", "24"]
    assert command(monkeypatch, *args, "--landmarks", "haar") == 0
    printed = capsys.readouterr().out
    assert r"broken-caf\udce9.mpg: zero bytes" in printed
    assert f"{'t' * 251}.mpg: its name is 8 bytes too long" in printed
    data = PreparedSet(out, split=None)
    assert [clip["name"] for clip in data.clips] == ["caf%E9", "l" * 240, "twice"]
    assert data.clips[2]["remarks"] == [
        f"another copy: taken because {raw / 'twice.mpeg'}: zero bytes"
    ]


@needs_grid
@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        (["--max-gb", "0.02"], "decodes to 0.02 GB, more than the limit of 0.02 GB"),
        (["--max-seconds", "2"], "lasts 3 s by its time stamps, more than the limit of 2 s"),
        (["--max-megapixels", "0.1"], "= 0.104 million pixels, more than the limit of 0.1 million"),
    ],
)
def test_limits_skip_by_name(limit, reason, tmp_path, monkeypatch, capsys):
    (tmp_path / "raw" / "s1").mkdir(parents=True)
    shutil.copy(GRID / REAL[0], tmp_path / "raw" / "s1")
    args = ["grid", tmp_path / "raw", tmp_path / "out", "--workers", "1", *limit]
    assert command(monkeypatch, *args) == 2
    skipped = capsys.readouterr().out.splitlines()[-1]
    assert skipped.startswith(f"  {tmp_path / 'raw' / REAL[0]}: ")
    assert reason in skipped


def test_too_little_disk_is_said_before_the_work(tmp_path, monkeypatch, capsys):
    usage = shutil._ntuple_diskusage(2 * 10**9, 10**9, 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(prepare, "run_jobs", None)
    assert command(monkeypatch, "synthetic", tmp_path / "out", "--clips", "1000") == 2
    said = "need about 2.86 GB and OUT has 1.00 GB free".replace("OUT", str(tmp_path / "out"))
    assert said in capsys.readouterr().err


@needs_grid
def test_nothing_usable_exits_with_2(corpus, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "grid", corpus / "s4", tmp_path / "out", "--workers", "1") == 2
    printed = capsys.readouterr()
    assert "silent.mpg: no audio stream" in printed.out
    assert "none of the 6 clips can be used" in printed.err


@needs_grid
def test_other_settings_need_another_directory(tmp_path, monkeypatch, capsys):
    (tmp_path / "raw" / "s1").mkdir(parents=True)
    shutil.copy(GRID / REAL[0], tmp_path / "raw" / "s1")
    out = prepare_grid(tmp_path / "raw", tmp_path / "out", size=(64, 48), workers=1)
    assert PreparedSet(out).size == (64, 48)
    again = ["grid", tmp_path / "raw", out, "--size", "64", "48", "--sample-rate", "40000"]
    assert command(monkeypatch, *again) == 2
    assert "sample_rate = 16000, not 40000" in capsys.readouterr().err
    assert command(monkeypatch, "grid", tmp_path / "raw", out) == 2
    assert "size = [64, 48], not [128, 96]" in capsys.readouterr().err
    assert command(monkeypatch, "synthetic", out, "--size", "64", "48") == 2
    assert "prepared with" in capsys.readouterr().err
    (out / "manifest.json").unlink()
    assert command(monkeypatch, "grid", tmp_path / "raw", out) == 2
    assert "has clips but no manifest.json" in capsys.readouterr().err


@needs_grid
def test_splits_file_overrides(tmp_path, monkeypatch, capsys):
    for clip in REAL:
        (tmp_path / clip).parent.mkdir(parents=True)
        shutil.copy(GRID / clip, tmp_path / clip)
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"val": ["s1"], "train": ["s2", "s7"]}))
    prepare_grid(tmp_path, tmp_path / "out", splits=splits, size=(64, 48), workers=1)
    assert "does not name them: s20" in capsys.readouterr().out
    assert PreparedSet(tmp_path / "out", "val").speakers == ["s1"]
    assert PreparedSet(tmp_path / "out", "train").speakers == ["s2"]
    splits = tmp_path / "out" / "splits.json"  # edited, it divides the set anew
    splits.write_text(json.dumps({"val": ["s2"], "train": ["s1"]}))
    prepare_grid(tmp_path, tmp_path / "out", splits=splits, size=(64, 48), workers=1)
    printed = capsys.readouterr().out
    assert "(2 were there before)" in printed
    assert "train anew: s1 from val to train, s2 from train to val\n" in printed
    assert PreparedSet(tmp_path / "out", "train").speakers == ["s1"]
    for text, message in {
        '{"train": ["s1"], "val": ["s1"]}': "names s1 more than once",
        '{"training": ["s1"]}': "another form",
        '["s1"]': "another form",
        "{": "not JSON",
        '{"train": ["s8"]}': "no speaker of",
    }.items():
        splits.write_text(text)
        args = ["grid", tmp_path, tmp_path / "out2", "--splits", splits]
        assert command(monkeypatch, *args) == 2
        assert message in capsys.readouterr().err


@needs_grid
def test_stopped_run_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    for clip in REAL[:2]:
        (tmp_path / clip).parent.mkdir(parents=True)
        shutil.copy(GRID / clip, tmp_path / clip)
    args = ["grid", tmp_path, tmp_path / "out", "--workers", "1", "--size", "32", "24"]
    real = prepare.prepare_first

    def stop_at_second(copies, *rest, **options):
        if copies[0].speaker == "s2":
            raise KeyboardInterrupt
        return real(copies, *rest, **options)

    monkeypatch.setattr(prepare, "prepare_first", stop_at_second)
    assert command(monkeypatch, *args) == 130
    with pytest.raises(DataError, match="stopped early"):
        PreparedSet(tmp_path / "out", split=None)
    monkeypatch.setattr(prepare, "prepare_first", real)
    assert command(monkeypatch, *args) == 0
    assert "(1 were there before)" in capsys.readouterr().out
    assert len(PreparedSet(tmp_path / "out", split=None)) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["RAW/none", "OUT"], "does not exist"),
        (["RAW/s1/a.mpg", "OUT"], "is not a directory"),
        (["RAW/void", "OUT"], "holds no video"),
        (["RAW", "RAW/s1/a.mpg"], "is a file"),
        (["RAW", "RAW/s1/a.mpg/below"], "cannot write into"),
        (["RAW", "OUT", "--sample-rate", "44100"], "not a multiple of 1000"),
        (["RAW", "OUT", "--sample-rate", "0"], "not a multiple of 1000"),
        (["RAW", "OUT", "--size", "127", "96"], "positive and even"),
        (["RAW", "OUT", "--size", "0", "96"], "positive and even"),
        (["RAW", "OUT", "--workers", "0"], "workers must be greater than 0"),
        (["RAW", "OUT", "--seed", "-1"], "seed must not be negative"),
        (["RAW", "OUT", "--min-frames", "0"], "min-frames must be greater than 0"),
        (["RAW", "OUT", "--splits", "RAW/none.json"], "cannot read splits"),
        (["RAW", "OUT", "--size", "big", "small"], "size"),
        (["RAW"], "OUT"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, args, message):
    (tmp_path / "raw" / "s1").mkdir(parents=True)
    (tmp_path / "raw" / "void").mkdir()
    (tmp_path / "raw" / "s1" / "a.mpg").touch()
    places = {"RAW": str(tmp_path / "raw"), "OUT": str(tmp_path / "out")}
    for name, place in places.items():
        args = [arg.replace(name, place) for arg in args]
    assert command(monkeypatch, "grid", *args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seconds", "nan"], "seconds must be greater than 0"),
        (["--seconds", "0.01"], "less than one frame"),
        (["--fps", "-25"], "fps must be greater than 0"),
        (["--clips", "0"], "clips must be greater than 0"),
        (["--speakers", "0"], "speakers must be greater than 0"),
    ],
)
def test_mistakes_with_synthetic_clips(tmp_path, monkeypatch, capsys, args, message):
    assert command(monkeypatch, "synthetic", tmp_path / "out", *args) == 2
    assert message in capsys.readouterr().err


def test_synthetic_set_is_made_once_and_completed(tmp_path, monkeypatch, capsys):
    options = {"clips": 4, "speakers": 3, "seconds": 0.2, "size": (32, 24), "workers": 1}
    out = prepare_synthetic(tmp_path / "set", **options)
    data = PreparedSet(out, split=None)
    assert len(data) == 4
    assert len(data.speakers) == 3
    assert data[0]["frames"].shape == (5, 3, 32, 24)
    assert {clip["split"] for clip in data.clips} == {"train", "val", "test"}
    before = {clip["file"]: (out / clip["file"]).read_bytes() for clip in data.clips}

    lost = out / data.clips[2]["file"]
    lost.unlink()
    prepare_synthetic(out, **options)
    assert "(3 were there before)" in capsys.readouterr().out
    assert lost.read_bytes() == before[data.clips[2]["file"]]

    monkeypatch.setattr(prepare, "_render", None)  # now nothing is left to render
    assert prepare_synthetic(out, **options) == out
    with pytest.raises(DataError, match="prepared with seed = 0, not 1"):
        prepare_synthetic(out, **options, seed=1)
    with pytest.raises(DataError, match=r"seconds = 0\.2, not 3\.0"):
        prepare_synthetic(out, **options | {"seconds": 3})


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "write_clip", full)
    with pytest.raises(DataError, match=r"cannot write into .*: No space left on device"):
        prepare_synthetic(tmp_path, clips=2, speakers=1, seconds=0.1, size=(32, 24), workers=1)


@pytest.mark.slow
def test_dead_worker_costs_only_its_own_job():
    jobs = [Job(str(i), functools.partial(Path, str(i))) for i in range(6)]
    jobs.insert(2, Job("bad", functools.partial(os._exit, 1)))
    jobs.insert(4, Job("wrong", functools.partial(int, "x")))
    outcomes = {job.name: (made, reason) for job, made, reason, _ in run_jobs(jobs, workers=2)}
    assert outcomes.pop("bad") == (None, DIED)
    assert "invalid literal" in outcomes.pop("wrong")[1]
    assert outcomes == {str(i): (Path(str(i)), "") for i in range(6)}


@pytest.mark.slow
def test_workers_that_cannot_start_end_the_run():
    jobs = [Job(str(i), functools.partial(os._exit, 1)) for i in range(30)]
    with pytest.raises(JobFailed, match="worker processes die as they start"):
        list(run_jobs(jobs, workers=2))


@needs_grid
@pytest.mark.slow
def test_workers_make_the_same_files(tmp_path):
    for clip in REAL:
        (tmp_path / "raw" / clip).parent.mkdir(parents=True)
        shutil.copy(GRID / clip, tmp_path / "raw" / clip)
    alone = prepare_grid(tmp_path / "raw", tmp_path / "one", workers=1)
    together = prepare_grid(tmp_path / "raw", tmp_path / "two", workers=2)
    names = sorted(path.relative_to(alone) for path in alone.rglob("*") if path.is_file())
    assert len(names) == 6
    for name in names:
        assert (alone / name).read_bytes() == (together / name).read_bytes(), name


def test_help_teaches_by_example(monkeypatch, capsys):
    assert command(monkeypatch, "grid", "--help") == 0
    assert "python -m train.prepare grid ~/corpora/GRID data/grid" in capsys.readouterr().out
