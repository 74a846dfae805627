"""Corpora as they are downloaded: whose each clip is, what is no clip, and how they are divided.

Most trees here are of empty files: their names are all that counts before a clip is decoded.
"""

import os
import sys

import pytest

from train import prepare
from train.data.crema_d import CREMA_D
from train.data.grid import GRID, find_clips
from train.data.prepared import DataError
from train.data.splits import read_splits, write_splits
from train.data.tcd_timit import TCD_TIMIT
from train.data.videos import ANY


def plant(root, paths, content=b"x"):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def identities(corpus, raw):
    return {s.path.relative_to(raw).as_posix(): (s.speaker, s.name) for s in corpus.find(raw)}


LAYOUTS = {
    GRID: {
        "s1/bbaf2n.mpg": ("s1", "bbaf2n"),
        "S2/video/BBAF2N.MPG": ("s2", "bbaf2n"),
        "s03/video/mpg_6000_part2/bbaf3s.mpg": ("s3", "bbaf3s"),
        "s4.mpg_vcd/bbaf4p.mpg": ("s4", "bbaf4p"),
        "s5.mpg_6000.part1/s5/video/mpg_6000/bbaf5a.mpg": ("s5", "bbaf5a"),
        "s6_video/mpg_vcd/bbaf2n.mpg": ("s6", "bbaf2n"),
        "talker7/video/bbaf2n.mpg": ("talker7", "bbaf2n"),
        "me/My Clip.mp4": ("me", "My Clip"),
    },
    CREMA_D: {
        "VideoFlash/1001_DFA_ANG_XX.flv": ("1001", "1001_DFA_ANG_XX"),
        "CREMA-D-master/videoflash/1002_dfa_ang_xx.FLV": ("1002", "1002_DFA_ANG_XX"),
        "1040_ITH_SAD_X.mp4": ("1040", "1040_ITH_SAD_X"),
    },
    TCD_TIMIT: {
        "volunteers/01M/Clips/straightcam/sa1.mp4": ("01M", "sa1"),
        "volunteers/02m/CLIPS/StraightCam/SX123.MP4": ("02M", "sx123"),
        "03F/03F/Clips/straightcam/si1004.mp4": ("03F", "si1004"),
        "lipspeakers/Lipspkr1/Clips/straightcam/sa1.mp4": ("Lipspkr1", "sa1"),
        "lipspeakers/LIPSPKR2/Clips/straightcam/sa1.mp4": ("Lipspkr2", "sa1"),
    },
    ANY: {
        "mine/Ann/talk.mp4": ("Ann", "talk"),
        "mine/Ann/day 2/talk.mov": ("Ann", "day 2_talk"),
        "mine/Žofie/ř.webm": ("Žofie", "ř"),
    },
}


@pytest.mark.parametrize("corpus", LAYOUTS, ids=lambda corpus: corpus.key)
def test_layouts_as_downloaded(tmp_path, corpus):
    plant(tmp_path, [*LAYOUTS[corpus], "readme.txt", "s1/bbaf2n.align", "s1/._bbaf2n.mpg"])
    assert identities(corpus, tmp_path) == LAYOUTS[corpus]


@pytest.mark.parametrize(
    ("corpus", "other", "said"),
    [
        (CREMA_D, "VideoFlash/holiday.flv", "1 videos that are no clips of CREMA-D"),
        (TCD_TIMIT, "volunteers/01M/Clips/30degcam/sa1.mp4", "1 videos that are no clips of TCD"),
        (TCD_TIMIT, "volunteers/01M/Raw/straightcam.mp4", "1 videos that are no clips of TCD"),
    ],
)
def test_other_videos_are_left_out_and_said(tmp_path, capsys, corpus, other, said):
    plant(tmp_path, [*LAYOUTS[corpus], other])
    assert identities(corpus, tmp_path) == LAYOUTS[corpus]
    printed = capsys.readouterr().out
    assert said in printed
    assert other in printed
    raw = plant(tmp_path / "alone", ["clip.mp4"])
    with pytest.raises(DataError, match=r"no clip of .* such as .*clip\.mp4"):
        corpus.find(raw)


def test_speakers_of_grid_through_links_and_folders_above(tmp_path):
    """The rows of a table of what once went wrong, each by itself."""
    clips = [f"{speaker}/{name}.mpg" for speaker in ("s1", "s2") for name in ("bbaf2n", "bbaf3s")]
    expected = {clip: (clip[:2], clip[3:9]) for clip in clips}

    folders = tmp_path / "folders"  # speaker folders that are links
    plant(tmp_path / "disk", clips)
    folders.mkdir()
    for speaker in ("s1", "s2"):
        (folders / speaker).symlink_to(tmp_path / "disk" / speaker)
    assert identities(GRID, folders) == expected

    linked = tmp_path / "linked"  # clips linked into a cache
    for number, clip in enumerate(clips):
        plant(tmp_path / "cache", [f"s9/{number:02x}/blob"])
        (linked / clip).parent.mkdir(parents=True, exist_ok=True)
        (linked / clip).symlink_to(tmp_path / "cache" / f"s9/{number:02x}/blob")
    assert identities(GRID, linked) == expected

    annex = tmp_path / "annex"  # caches below RAW, hidden or not
    for number, clip in enumerate(clips):
        store = plant(annex, [f"{'.git/annex' if number % 2 else 'store'}/{number}/blob.mpg"])
        (annex / clip).parent.mkdir(parents=True, exist_ok=True)
        (annex / clip).symlink_to(next(store.glob(f"*/**/{number}/blob.mpg")))
    assert identities(GRID, annex) == expected

    upper = plant(tmp_path / "upper", [f"{clip[:2].upper()}/video/{clip[3:]}" for clip in clips])
    assert {*identities(GRID, upper).values()} == {*expected.values()}

    # A corpus below a folder called s3, whether RAW is the corpus, that folder, or above it.
    bucket = plant(tmp_path / "s3", [f"grid/talker{clip[1:]}" for clip in clips])
    for raw in (
        bucket / "grid",
        bucket,
        plant(tmp_path / "top", [f"s3/grid/talker{clip[1:]}" for clip in clips]),
    ):
        assert {who for who, _ in identities(GRID, raw).values()} == {"talker1", "talker2"}
    plain = plant(tmp_path / "b" / "s3", ["ann/bbaf2n.mpg", "bob/video/bbaf2n.mpg"])
    assert {who for who, _ in identities(GRID, plain).values()} == {"ann", "bob"}

    # RAW is a speaker's own folder, or one in it.
    for raw in (upper / "S1", upper / "S1" / "video"):
        assert {who for who, _ in identities(GRID, raw).values()} == {"s1"}


def test_names_that_cannot_be_printed(tmp_path):
    plant(tmp_path, ["two\nlines/a\\b.mp4", os.fsdecode(b"caf\xe9/c.mp4")])
    found = {(source.speaker, source.name) for source in ANY.find(tmp_path)}
    assert found == {("two%0Alines", "a%5Cb"), ("caf%E9", "c")}


def test_relative_raw(tmp_path, monkeypatch):
    monkeypatch.chdir(plant(tmp_path / "s7" / "video", ["bbaf2n.mpg"]))
    assert [(source.speaker, source.name) for source in find_clips(".")] == [("s7", "bbaf2n")]


def test_speakers_of_own_videos(tmp_path):
    alone = plant(tmp_path / "alone", ["ann/a.mp4", "ann/day/b.mp4"])
    assert {who for who, _ in identities(ANY, alone).values()} == {"ann"}
    flat = plant(tmp_path / "flat", ["a.mp4", "b.mp4"])
    assert {*identities(ANY, flat).values()} == {("flat", "a"), ("flat", "b")}
    voxceleb = plant(tmp_path / "vox", ["id1/x/00001.mp4", "id1/y/00001.mp4", "id2/z/00001.mp4"])
    assert {*identities(ANY, voxceleb).values()} == {
        ("id1", "x_00001"),
        ("id1", "y_00001"),
        ("id2", "z_00001"),
    }


def test_unusable_files_are_named_as_what_they_are(tmp_path, capsys):
    plant(tmp_path, ["s1/bbaf2n.mpg", "s2/bbaf2n.mpg.part", "s2/bbaf3s.mpg.crdownload"])
    plant(tmp_path, ["s1/lrarzn.mpg", "s1.mpg_vcd.zip", "s9.mpg_vcd.zip", "alignments.zip"])
    plant(tmp_path, ["alignments/s1/bbaf2n.align"])
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    plant(tmp_path, ["s3/bbaf2n.mpg"], pointer)
    (tmp_path / "s4").mkdir()
    (tmp_path / "s4" / "bbaf2n.mpg").symlink_to(tmp_path / "annex" / "lost")
    (tmp_path / "s5").mkdir()
    os.mkfifo(tmp_path / "s5" / "bbaf2n.mpg")
    boxes = b"\0\0\0\x0cftypisom" + b"\0\0\x01\0mdat"
    plant(tmp_path, ["s6/bbaf2n.mp4"], boxes)
    plant(tmp_path, ["s7/bbaf2n.mp4"], boxes + bytes(248) + b"\x7f\0\0\0SEFT")
    plant(tmp_path, ["s8/bbaf2n.mp4"], boxes[:12] + b"\0\0\0\x01mdat" + (999).to_bytes(8))
    problems = {(s.speaker, s.name): s.problem for s in find_clips(tmp_path)}
    assert problems.pop(("s1", "bbaf2n")) == problems.pop(("s7", "bbaf2n")) == ""
    for key, said in {
        ("s1", "lrarzn"): "known to be bad: it opens with a grey picture",
        ("s2", "bbaf2n"): "an unfinished download",
        ("s2", "bbaf3s"): "an unfinished download",
        ("s3", "bbaf2n"): "a pointer of Git LFS",
        ("s4", "bbaf2n"): "a link that leads nowhere",
        ("s5", "bbaf2n"): "not a file",
        ("s6", "bbaf2n"): "an unfinished download: 20 of 268 bytes are here",
        ("s8", "bbaf2n"): "an unfinished download: 28 of 1011 bytes are here",
    }.items():
        assert said in problems.pop(key)
    assert not problems
    printed = capsys.readouterr().out
    assert "not unpacked, so not read: s9.mpg_vcd.zip\n" in printed

    only = plant(tmp_path / "zip", ["s1.zip"])
    with pytest.raises(DataError, match=r"such as .*s1\.zip; unpack the archives first"):
        find_clips(only)


def test_sound_beside_the_video(tmp_path):
    plant(tmp_path, ["VideoFlash/1001_DFA_ANG_XX.flv", "VideoFlash/1002_DFA_ANG_XX.flv"])
    plant(tmp_path, ["AudioWAV/1001_DFA_ANG_XX.wav", "AudioMP3/1001_DFA_ANG_XX.mp3"])
    plant(tmp_path, ["AudioMP3/1002_DFA_ANG_XX.mp3"])
    sounds = {source.speaker: source.sound for source in CREMA_D.find(tmp_path)}
    assert sounds["1001"] == tmp_path / "AudioWAV/1001_DFA_ANG_XX.wav"
    assert sounds["1002"] == tmp_path / "AudioMP3/1002_DFA_ANG_XX.mp3"

    grid = plant(tmp_path / "grid", ["s1/video/bbaf2n.mpg", "audio_25k/s1/bbaf2n.wav"])
    assert find_clips(grid)[0].sound == grid / "audio_25k/s1/bbaf2n.wav"
    own = plant(tmp_path / "own", ["ann/a.mp4", "ann/a.wav", "bob/a.mp4", "bob/b.wav"])
    assert [source.sound for source in ANY.find(own)] == [own / "ann/a.wav", None]


def test_known_bad_clips_of_crema_d(tmp_path):
    names = ["1076_MTI_NEU_XX", "1076_MTI_SAD_XX", "1064_TIE_SAD_XX", "1064_IEO_DIS_MD"]
    plant(tmp_path, [f"VideoFlash/{name}.flv" for name in [*names, "1001_DFA_ANG_XX"]])
    bad = [source.name for source in CREMA_D.find(tmp_path) if source.problem]
    assert sorted(bad) == sorted(names)


def speakers_of(assigned):
    return {
        split: {who for (who, _), s in assigned.items() if s == split} for split in prepare.SPLITS
    }


@pytest.mark.parametrize(
    ("corpus", "speakers", "sizes"),
    [
        (GRID, [f"s{i}" for i in range(1, 35) if i != 21], (16, 7, 10)),
        (CREMA_D, [str(actor) for actor in range(1001, 1092)], (64, 13, 14)),
        (ANY, [f"p{i}" for i in range(10)], (5, 2, 3)),
    ],
    ids=lambda value: getattr(value, "key", None),
)
def test_speakers_are_drawn_in_the_published_proportions(corpus, speakers, sizes):
    clips = [(speaker, f"{i}") for speaker in speakers for i in range(2)]
    drawn = speakers_of(corpus.divide(clips, 3))
    assert tuple(map(len, drawn.values())) == sizes
    assert set().union(*drawn.values()) == set(speakers)
    assert (
        drawn == speakers_of(corpus.divide(clips[::-1], 3)) != speakers_of(corpus.divide(clips, 4))
    )


def test_splits_are_read_as_they_were_written(tmp_path):
    write_splits(tmp_path / "splits.json", {("s10", "1"): "train", ("s2", "1"): "train"})
    assert read_splits(tmp_path / "splits.json") == {"s2": "train", "s10": "train"}
    write_splits(tmp_path / "none.json", {("s2", "1"): "train", ("s2", "2"): "val"})
    assert not (tmp_path / "none.json").exists()


def test_tcd_timit_is_divided_as_published(capsys):
    published = TCD_TIMIT.published
    test = "08F 09F 15F 18M 25M 28M 33F 34M 36F 41M 44F 45F 49F 54M 55F 56M 58F"
    assert " ".join(sorted(who for who, s in published.items() if s != "train")) == test
    assert [*published.values()].count("train") == 39
    assert sorted(int(who[:2]) for who in [*published, "27M", "35M", "53M"]) == [*range(1, 60)]
    clips = [(who, "sa1") for who in [*published, "27M", "35M", "53M", "Lipspkr1"]]
    assert TCD_TIMIT.divide(clips, 0) == {(who, "sa1"): split for who, split in published.items()}
    assert TCD_TIMIT.divide(clips, 0) == TCD_TIMIT.divide(clips, 1)

    few = [(who, "sa1") for who in ("01M", "02M", "03F", "35M")]
    drawn = speakers_of(TCD_TIMIT.divide(few, 0))
    assert [len(names) for names in drawn.values()] == [1, 1, 1]
    assert "35M" not in set().union(*drawn.values())
    assert "divided 39 : 8 : 9 at random instead" in (printed := capsys.readouterr().out)
    assert "does not name them: 35M\n" in printed


def command(monkeypatch, *args):
    """Run ``python -m train.prepare ARGS`` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, args)])
    try:
        return prepare.main()
    except SystemExit as stop:  # after --help
        return stop.code


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4,Ann\n", "lacks the columns file,speaker"),
        ("", "lacks the columns file,speaker"),
        ("file,speaker\na.mp4\n", "line 2: file 'a.mp4' and speaker ''"),
        ("file,speaker\na.mp4,../Ann\n", "the speaker without a slash"),
        ("file,speaker\nc.mp4,Ann\n", "line 2: there is no file"),
        ("file,speaker\na.mp4,Ann\na.mp4,Bob\n", "line 3: a.mp4 has another speaker"),
        ("file,speaker\n../out.mp4,Ann\n", "out.mp4, which is no video of the corpus"),
        ("file,speaker\n\xe9,Ann\n".encode("latin-1"), "is no CSV in UTF-8"),
    ],
)
def test_mistakes_in_a_file_of_speakers(tmp_path, monkeypatch, capsys, text, message):
    raw = plant(tmp_path / "raw", ["a.mp4", "b.mp4", "../out.mp4"])
    told = tmp_path / "speakers.csv"
    told.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert command(monkeypatch, "any", raw, tmp_path / "new", "--speakers", told) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(told) in error
    assert "Traceback" not in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["any", "RAW", "OUT", "--clip-seconds", "0.5"], "fewer than min-frames 25"),
        (["any", "RAW", "OUT", "--fps", "0"], "fps must be greater than 0"),
        (["any", "RAW", "OUT", "--speakers", "none.csv"], "cannot read speakers none.csv"),
        (["crema-d", "RAW", "OUT"], "holds no clip of CREMA-D"),
        (["tcd-timit", "RAW", "OUT"], "volunteers/01M/Clips/straightcam/sa1.mp4"),
        (["tcd-timit", "none", "OUT"], "RAW none does not exist"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, args, message):
    raw = plant(tmp_path / "raw", ["a.mp4"])
    places = {"RAW": raw, "OUT": tmp_path / "new"}
    assert command(monkeypatch, *(places.get(arg, arg) for arg in args)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("corpus", LAYOUTS, ids=lambda corpus: corpus.key)
def test_help_teaches_by_example(monkeypatch, capsys, corpus):
    assert command(monkeypatch, corpus.key, "--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"python -m train.prepare {corpus.key} ~/" in printed
    assert "training mirrors clips at random (python -m train --mirror" in printed
