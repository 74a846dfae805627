"""The GRID corpus as it is downloaded.

Cooke, Barker, Cunningham, Shao, "An audio-visual corpus for speech perception and automatic
speech recognition", JASA 2006: 33 speakers with video, 1000 sentences each, 75 frames at 25 fps.
"""

from __future__ import annotations

import re
from pathlib import Path

from train.data.corpus import Corpus, Identity, folders_above, folders_below, stem

# s1, S01, s1.mpg_vcd, s1_mpg_6000_part2: folders of a speaker, and of the archives of one.
_SPEAKER = re.compile(r"s0*(\d+)(?:[\W_].*)?", re.IGNORECASE)
_OTHER_SPEAKER = re.compile(r"(talker|speaker|subject|spk|id)[ _-]?\d+", re.IGNORECASE)
# video, mpg_6000, mpg_vcd, part2, ...: folders that say nothing of the speaker
_FORMAT = re.compile(r"(videos?|mpe?g|vcd|avi|mp4|high|normal|part|audio|[\W_\d])+", re.IGNORECASE)
_SENTENCE = re.compile(r"[bpls][bgrw][abiw][a-z][z0-9][anps]", re.IGNORECASE)


class _Grid(Corpus):
    def identify(self, path: Path, raw: Path) -> Identity | None:
        """Tell the speaker by the folders.

        That is the nearest folder below RAW that is called like a speaker; without one, the
        nearest folder at any height that is not called like a format. So s1/bbaf2n.mpg and
        s1/video/mpg_6000/bbaf2n.mpg both are bbaf2n of speaker s1.
        """
        name = stem(path)
        name = name.lower() if _SENTENCE.fullmatch(name) else name
        below, above = folders_below(path, raw), folders_above(raw)
        named = [folder for folder in below if _SPEAKER.fullmatch(folder) or _is_other(folder)]
        plain = [folder for folder in [*below, *above] if not _FORMAT.fullmatch(folder)]
        return Identity(_speaker([*named, *plain, above[0]][0]), name)


def _is_other(folder: str) -> bool:
    return bool(_OTHER_SPEAKER.fullmatch(folder))


def _speaker(folder: str) -> str:
    match = _SPEAKER.fullmatch(folder)
    return f"s{match[1]}" if match else folder


GRID = _Grid(
    key="grid",
    title="GRID",
    about="""Prepare the GRID corpus (https://zenodo.org/records/3625687) as it is downloaded.

    Example: python -m train.prepare grid ~/corpora/GRID data/grid --workers 8

    50-20-30 % of the speakers are drawn for train, val and test. The published GRID model hears at
    40000 Hz.""",
    layout="s1/, s2/, ... with *.mpg",
    fps=25.0,
    sample_rate=16000,
    min_frames=75,
    shares={"train": 16, "val": 7, "test": 10},
    bad={Identity("s1", "lrarzn"): "it opens with a grey picture"},
)
find_clips = GRID.find
