"""The CREMA-D corpus as it is downloaded.

Cao, Cooper, Keutmann, Gur, Nenkova, Verma, "CREMA-D: Crowd-sourced emotional multimodal actors
dataset", IEEE Transactions on Affective Computing 2014: 91 actors, 12 sentences, 7442 clips of 1 to
5 s in Flash video at 30 fps. License: Open Database License (ODbL).
"""

from __future__ import annotations

import re
from pathlib import Path

from train.data.corpus import Corpus, Identity, stem

# Actor, sentence, emotion, level (one clip has only X of XX).
_CLIP = re.compile(r"(1\d{3})_[A-Z]{3}_[A-Z]{3}_[A-Z]{1,2}")


class _CremaD(Corpus):
    def identify(self, path: Path, raw: Path) -> Identity | None:
        """Tell the actor by the first four digits of the file's name; folders say nothing."""
        match = _CLIP.fullmatch(stem(path).upper())
        return Identity(match[1], match[0]) if match else None


def _bad(name: str) -> Identity:
    return Identity(name[:4], name)


CREMA_D = _CremaD(
    key="crema-d",
    title="CREMA-D",
    about="""Prepare the CREMA-D corpus (https://github.com/CheyneyComputerScience/CREMA-D).

    Example: python -m train.prepare crema-d ~/corpora/CREMA-D data/crema-d --workers 8

    Actors are told by the first four digits of a file's name; 70-15-15 % of them are drawn for
    train, val and test. The sound is the video's own; where it has none, that of the same name in
    AudioWAV.""",
    layout="VideoFlash/1001_DFA_ANG_XX.flv",
    fps=30.0,
    sample_rate=16000,
    min_frames=30,
    shares={"train": 64, "val": 13, "test": 14},  # 70-15-15 % of the 91 actors
    # https://github.com/CheyneyComputerScience/CREMA-D/issues/8
    bad={
        _bad("1064_IEO_DIS_MD"): "it lasts 61 s and holds other clips",
        _bad("1064_TIE_SAD_XX"): "it lasts no time",
        _bad("1076_MTI_NEU_XX"): "it has no sound",
        _bad("1076_MTI_SAD_XX"): "it shows no face and has no sound",
    },
)
