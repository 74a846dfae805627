"""A folder of talking-head videos of one's own: whose they are say its folders, or a CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from train.data.corpus import (
    Corpus,
    Identity,
    Source,
    folders_above,
    folders_below,
    printable,
    stem,
)
from train.data.prepared import DataError

_COLUMNS = ["file", "speaker"]


class _Videos(Corpus):
    def identify_all(self, paths: list[Path], raw: Path) -> dict[Path, Identity | None]:
        """Tell the speaker by the first folder in which the videos differ.

        So everything in a folder of a person is that person's, however deep it lies. A clip is
        called by its folders within that one and its own name.
        """
        ways = {path: [*reversed(folders_below(path, raw))] for path in paths}
        levels = list(zip(*ways.values(), strict=False))  # of the folders that every video has
        differ = [i for i, folders in enumerate(levels) if len(set(folders)) > 1]
        # Where they never differ, the last one is the speaker's.
        common = differ[0] if differ else max(0, len(levels) - 1)
        identities: dict[Path, Identity | None] = {}
        for path, way in ways.items():
            speaker = [*way[common:], folders_above(raw)[0]][0]
            identities[path] = Identity(speaker, "_".join([*way[common + 1 :], stem(path)]))
        return identities

    def sounds(
        self, files: list[Path], videos: Mapping[Path, Identity | None], raw: Path
    ) -> dict[Identity, Path]:
        """Take a sound file for the video of the same name in the same folder."""
        beside = {path.with_suffix(""): path for path in files}
        return {
            identity: beside[path.with_suffix("")]
            for path, identity in videos.items()
            if identity is not None and path.with_suffix("") in beside
        }


def read_speakers(path: str | os.PathLike[str], raw: Path) -> dict[Path, Identity]:
    """Read a CSV file with the columns file and speaker, files relative to ``raw``.

    A clip is called by its folders below ``raw`` and its own name. ``DataError`` says which line
    is wrong.
    """
    expected = "expected lines of FILE,SPEAKER below a first line: file,speaker"
    speakers: dict[Path, Identity] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or []]
            if not set(_COLUMNS) <= set(rows.fieldnames):
                raise DataError(f"speakers {path} lacks the columns file,speaker; {expected}")
            for row in rows:
                name, speaker = ((row[column] or "").strip() for column in _COLUMNS)
                where = f"speakers {path}, line {rows.line_num}"
                if not name or not speaker or speaker in (".", "..") or set(speaker) & set("/\\"):
                    raise DataError(
                        f"{where}: file {name!r} and speaker {speaker!r}; {expected}, the speaker "
                        "without a slash"
                    )
                place = Path(os.path.normpath(raw / name))
                if not place.is_file():
                    raise DataError(f"{where}: there is no file {place}; give it relative to RAW")
                if place in speakers and speakers[place].speaker != speaker:
                    raise DataError(f"{where}: {name} has another speaker in an earlier line")
                way = [*reversed(folders_below(place, raw))] if raw in place.parents else []
                speakers[place] = Identity(speaker, "_".join([*way, stem(place)]))
    except OSError as error:
        raise DataError(f"cannot read speakers {path} ({error.strerror}); {expected}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"speakers {path} is no CSV in UTF-8 ({error}); {expected}") from None
    return speakers


def told(sources: list[Source], speakers: Path, raw: Path) -> list[Source]:
    """Those of ``sources`` that the file ``speakers`` names, with the speakers that it gives."""
    named = read_speakers(speakers, raw)
    found = {Path(os.path.normpath(source.path)): source for source in sources}
    unknown = [path for path in named if path not in found]
    if unknown:
        raise DataError(f"speakers {speakers} names {unknown[0]}, which is no video of the corpus")
    if len(named) < len(found):
        print(f"left out, because {speakers} does not name them: {len(found) - len(named)} videos")
    return [
        replace(found[path], speaker=who.speaker, name=printable(who.name))
        for path, who in named.items()
    ]


ANY = _Videos(
    key="any",
    title="a video",
    about="""Prepare talking-head videos of your own, each with one face and one voice.

    Example: python -m train.prepare any ~/videos data/own --workers 8

    Speakers are told by the first folders in which the videos differ, or by --speakers FILE;
    50-20-30 % of them are drawn for train, val and test.""",
    layout="*.mp4, *.mov, ... in a folder for each speaker",
    fps=25.0,
    sample_rate=16000,
    min_frames=25,
    shares={"train": 16, "val": 7, "test": 10},
)
