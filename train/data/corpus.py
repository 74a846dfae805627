"""What the corpora have in common: their videos on disk, whose they are, and how they are divided.

A corpus is a :class:`Corpus`: ``grid.GRID``, ``crema_d.CREMA_D``, ``tcd_timit.TCD_TIMIT``, or
``videos.ANY`` for a folder of one's own. Every one is read as it is downloaded: nested, partly
unpacked, in upper or lower case, through links.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from train.data.prepared import DataError
from train.data.splits import Splits, draw_splits, natural

VIDEO = {
    *(".mpg", ".mpeg", ".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".flv"),
    *(".wmv", ".3gp", ".mts", ".m2ts", ".ogv"),
}
SOUND = {".wav", ".flac", ".mp3", ".m4a"}
UNFINISHED = {".part", ".crdownload", ".download", ".partial", ".aria2", ".filepart", ".!ut"}
_ARCHIVE = re.compile(r".+\.(zip|tar|tar\.gz|tgz|tar\.bz2|7z|rar)", re.IGNORECASE)
_BOXES = {b"ftyp", b"styp", b"moov", b"mdat", b"moof", b"mfra", b"sidx", b"free", b"skip", b"wide"}
_POINTER = b"version https://git-lfs.github.com/spec/"  # a file that Git LFS has yet to fetch


class Identity(NamedTuple):
    """Whose clip a file is, and which one of theirs."""

    speaker: str
    name: str


@dataclass(frozen=True)
class Source:
    """One clip of a corpus on disk; speaker and name can be printed, whatever the path holds."""

    path: Path
    speaker: str
    name: str
    sound: Path | None = None  # a sound file of the same clip, for a video that has none
    problem: str = ""  # why it cannot be used, where that is known before it is decoded


@dataclass(frozen=True, eq=False)
class Corpus:
    """A corpus as it is downloaded: how its clips are found, and what is known of it."""

    key: str  # on the command line and in manifests
    title: str
    about: str  # what it is, an example and what is special, for the command's help
    layout: str  # where its videos lie, for messages
    fps: float  # frames per second that it is prepared at
    sample_rate: int  # Hz, likewise
    min_frames: int  # in shorter clips something is wrong
    shares: Mapping[str, int]  # numbers of speakers in train, val and test, or their proportions
    published: Mapping[str, str] = field(default_factory=dict)  # speaker -> published split
    bad: Mapping[Identity, str] = field(default_factory=dict)  # known bad clips, and why

    def identify(self, path: Path, raw: Path) -> Identity | None:
        """Tell whose clip the file at ``path`` below ``raw`` is; None if it is none of the corpus.

        Folders and files may be links; what counts is the name of the link, not where it leads.
        """
        raise NotImplementedError

    def identify_all(self, paths: list[Path], raw: Path) -> dict[Path, Identity | None]:
        """Identify all videos of a corpus, for those where one tells something of another."""
        return {path: self.identify(path, raw) for path in paths}

    def find(self, raw: str | os.PathLike[str]) -> list[Source]:
        """Find the clips under ``raw``, at any depth, in a stable order.

        A clip that is known to be bad, that Git LFS has yet to fetch, whose download is unfinished
        or whose link leads nowhere is among them, with its ``problem``. Videos that are none of
        the corpus, and archives that nobody has unpacked, are printed.
        """
        raw = Path(raw)
        if not raw.is_dir():
            what = "is not a directory" if raw.exists() else "does not exist"
            raise DataError(f"RAW {raw} {what}; give the folder that holds {self.layout}")
        files = sorted(walk(raw), key=natural)
        videos = [path for path in files if _finished(path).suffix.lower() in VIDEO]
        videos = _without_targets(videos, raw)
        identities = self.identify_all(videos, raw)
        found = [path for path in videos if identities[path] is not None]
        archives = [path for path in files if _ARCHIVE.fullmatch(_finished(path).name)]
        if not found:
            what = f"no clip of {self.title}" if videos else "no video"
            others = [*videos, *archives]
            seen = f"; what it holds are files such as {others[0]}" if others else ""
            unpack = "; unpack the archives first" if archives else ""
            raise DataError(f"RAW {raw} holds {what} at any depth ({self.layout}){seen}{unpack}")
        if len(found) < len(videos):
            other = next(path for path in videos if identities[path] is None)
            print(
                f"left out {len(videos) - len(found)} videos that are no clips of {self.title} "
                f"({self.layout}), such as {other}"
            )
        folders = {_first_part(folder) for path in files for folder in folders_below(path, raw)}
        packed = [path.name for path in archives if _first_part(path.name) not in folders]
        if packed:
            print(f"not unpacked, so not read: {', '.join(packed)}")
        heard = [path for path in files if path.suffix.lower() in SOUND and not _problem(path)]
        heard.sort(key=lambda path: path.suffix.lower() == ".wav")  # the last one wins
        sounds = self.sounds(heard, identities, raw)
        sources = []
        for path in found:
            identity = identities[path]
            assert identity is not None
            problem = self.bad.get(identity, "") and f"known to be bad: {self.bad[identity]}"
            problem = problem or _problem(path)
            speaker, name = map(printable, identity)
            sources.append(Source(path, speaker, name, sounds.get(identity), problem))
        return sources

    def sounds(
        self, files: list[Path], videos: Mapping[Path, Identity | None], raw: Path
    ) -> dict[Identity, Path]:
        """Find the sound files that lie beside the videos, or in folders of their own."""
        named = {self.identify(path, raw): path for path in files}
        return {identity: path for identity, path in named.items() if identity is not None}

    def divide(
        self,
        clips: Collection[tuple[str, str]],
        seed: int,
        given: Mapping[str, str] | None = None,
        source: str = "",
    ) -> Splits:
        """Assign clips, as (speaker, name), to train, val and test.

        The division ``given``, speaker -> split, is taken, which ``source`` is called; or the
        published one if the corpus has one and each of its parts is here; speakers that it does
        not name are left out. Otherwise speakers are drawn in the proportions ``shares``.
        """
        if given is None and self.published:
            given, source = self.published, f"the published division of {self.title}"
        named = clips if given is None else [clip for clip in clips if clip[0] in given]
        left_out = sorted({who for who, _ in clips} - {who for who, _ in named}, key=natural)
        if clips and not named:
            raise DataError(f"no speaker of {source} is in RAW, which has {', '.join(left_out)}")
        if left_out:
            print(f"left out, because {source} does not name them: {', '.join(left_out)}")
        if given is None:
            return draw_splits(named, seed, self.shares)
        assigned = {clip: given[clip[0]] for clip in named}
        if given is self.published and set(assigned.values()) != set(self.shares):
            shares = " : ".join(map(str, self.shares.values()))
            print(f"{source} has parts of which nobody is here; divided {shares} at random instead")
            return draw_splits(named, seed, self.shares)
        return assigned


def walk(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Everything below ``folder`` but folders, through links too, but not round in circles.

    What is hidden is left out: the stores of git-annex and DVC, and what macOS leaves in archives.
    """
    place = os.path.realpath(folder)
    if place in above:
        return
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot read the folder {folder} ({error.strerror})") from None
    for path in entries:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from walk(path, above | {place})
        else:
            yield path


def _without_targets(paths: list[Path], raw: Path) -> list[Path]:
    """Leave out files that links among ``paths`` lead to: the link has the clip's name."""
    places = {path: os.path.realpath(path) for path in paths}
    root = os.path.realpath(raw)
    links = {path for path in paths if places[path] != os.path.join(root, path.relative_to(raw))}
    targets = {places[path] for path in links}
    return [path for path in paths if path in links or places[path] not in targets]


def folders_below(path: Path, raw: Path) -> list[str]:
    """Names of the folders between ``raw`` and ``path``, the nearest to the file first."""
    return [folder.name for folder in path.relative_to(raw).parents][:-1]


def folders_above(raw: Path) -> list[str]:
    """Names of ``raw`` and the folders that it lies in, ``raw`` first."""
    raw = Path(os.path.abspath(raw))
    return [raw.name, *(folder.name for folder in raw.parents)]


def stem(path: Path) -> str:
    """Name of a file without the suffixes of its format and of an unfinished download."""
    return _finished(path).stem


def _finished(path: Path) -> Path:
    """What the file is called once its download is finished."""
    return path.with_suffix("") if path.suffix.lower() in UNFINISHED else path


def printable(name: str) -> str:
    """Write what is not UTF-8 in a name, line ends and backslashes as in an address: ``%E9``."""
    return re.sub(r"[\udc80-\udcff\x00-\x1f\\]", lambda char: f"%{ord(char[0]) & 0xFF:02X}", name)


def _problem(path: Path) -> str:
    if path.suffix.lower() in UNFINISHED:
        return "an unfinished download; finish it and run the command again"
    if not path.exists():
        return "a link that leads nowhere; fetch the file (git annex get, dvc pull, ...)"
    if not path.is_file():
        return "not a file"  # a pipe would be waited for
    try:
        with open(path, "rb") as file:
            start, whole = file.read(len(_POINTER)), _size_of_mp4(file)
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if start == _POINTER:
        return "a pointer of Git LFS, not the file itself; run: git lfs pull"
    if whole > size:
        return f"an unfinished download: {size} of {whole} bytes are here"
    return ""


def _size_of_mp4(file: BinaryIO) -> int:
    """Where the boxes of an MP4 or MOV file should end, in bytes; 0 for other files."""
    at = 0
    while True:
        file.seek(at)
        box = file.read(16)
        if box[4:8] not in (_BOXES if at else {b"ftyp"}):
            return at  # another kind of file, the end, or what a phone adds after it
        size = int.from_bytes(box[:4])
        size = int.from_bytes(box[8:]) if size == 1 else size
        if size < 8:  # to the end of the file, or no box
            return at
        at += size


def _first_part(name: str) -> str:
    """The name of a folder or an archive up to its first point: s1 of s1.mpg_vcd.zip."""
    return name.lower().split(".")[0]
