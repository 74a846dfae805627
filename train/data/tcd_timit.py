"""The TCD-TIMIT corpus as it is downloaded.

Harte, Gillen, "TCD-TIMIT: An audio-visual corpus of continuous speech", IEEE Transactions on
Multimedia 2015: 59 volunteers with 98 sentences each and three lipspeakers, filmed from the front
and from 30 degrees at 29.97 fps, 1920 x 1080. For research only, on application.
"""

from __future__ import annotations

import re
from pathlib import Path

from train.data.corpus import Corpus, Identity, folders_above, folders_below, stem

_VOLUNTEER = re.compile(r"\d\d[MF]", re.IGNORECASE)
_LIPSPEAKER = re.compile(r"lip(?:spkr|speaker)[ _-]?(\d)", re.IGNORECASE)
_SENTENCE = re.compile(r"s[aix]\d+", re.IGNORECASE)
_FROM_THE_SIDE = re.compile(r"30\W*deg.*", re.IGNORECASE)

# The authors' 17 test speakers are val and test here. 27M, 35M and 53M are left out of their
# division for their accents, and the lipspeakers are apart.
_PUBLISHED = {
    "train": "01M 02M 03F 04M 05F 06M 07F 10M 11F 12M 13F 14M 16M 17F 19M 20M 21M 22M 23M 24M 26M "
    "29M 30F 31F 32F 37F 38F 39M 40F 42M 43F 46F 47M 48M 50F 51F 52M 57M 59F",
    "val": "08F 09F 15F 18M 25M 28M 33F 36F",
    "test": "34M 41M 44F 45F 49F 54M 55F 56M 58F",
}


class _TcdTimit(Corpus):
    def identify(self, path: Path, raw: Path) -> Identity | None:
        """Tell the speaker by the nearest folder called like one; clips from the side are none."""
        folders = folders_below(path, raw)
        if not _SENTENCE.fullmatch(stem(path)) or any(map(_FROM_THE_SIDE.fullmatch, folders)):
            return None
        for folder in [*folders, *folders_above(raw)]:
            if _VOLUNTEER.fullmatch(folder):
                return Identity(folder.upper(), stem(path).lower())
            if match := _LIPSPEAKER.fullmatch(folder):
                return Identity(f"Lipspkr{match[1]}", stem(path).lower())
        return None


TCD_TIMIT = _TcdTimit(
    key="tcd-timit",
    title="TCD-TIMIT",
    about="""Prepare the TCD-TIMIT corpus (https://sigmedia.tcd.ie), its clips from the front.

    Example: python -m train.prepare tcd-timit ~/corpora/TCD-TIMIT data/tcd-timit --workers 8

    Speakers are divided as its authors do, with eight of their 17 test speakers set aside for val.
    The lipspeakers and 27M, 35M and 53M, whom that leaves out, are left out unless --splits names
    them.""",
    layout="volunteers/01M/Clips/straightcam/sa1.mp4",
    fps=30.0,
    sample_rate=48000,
    min_frames=30,
    shares={"train": 39, "val": 8, "test": 9},
    published={who: split for split, names in _PUBLISHED.items() for who in names.split()},
)
