"""Prepare training data: aligned faces with their sound, in the layout of ``train.data.prepared``.

    python -m train.prepare grid ~/corpora/GRID data/grid
    python -m train.prepare crema-d ~/corpora/CREMA-D data/crema-d
    python -m train.prepare tcd-timit ~/corpora/TCD-TIMIT data/tcd-timit
    python -m train.prepare any ~/videos data/own
    python -m train.prepare synthetic data/synthetic --clips 200

A run can be stopped at any time and started again: finished clips are kept.
"""

from __future__ import annotations

import functools
import math
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from train.config import load_config
from train.data.clips import expected_seconds, prepare_first, whole_name
from train.data.corpus import Corpus, Source
from train.data.crema_d import CREMA_D
from train.data.grid import GRID
from train.data.landmarks import choose, describe
from train.data.limits import Limits
from train.data.prepared import (
    MANIFEST,
    MANIFEST_VERSION,
    DataError,
    read_clip,
    read_header,
    read_manifest,
    write_clip,
)
from train.data.splits import SPLITS, Splits, draw_splits, read_splits, write_splits
from train.data.synthetic import render_clip
from train.data.tcd_timit import TCD_TIMIT
from train.data.videos import ANY, told
from train.errors import run
from train.files import write_json
from train.jobs import Job, run_jobs, usable_cores
from train.pictures import write_contact_sheet

SPLITS_FILE = "splits.json"
CONTACT_CLIPS = 64  # in the contact sheet, or one a speaker if there are more speakers
SKIPPED_SHOWN = 20

Raw = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RAW")]
Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
Workers = Annotated[int | None, tyro.conf.arg(metavar="INT")]
Landmarks = Annotated[str, tyro.conf.arg(metavar="auto|haar|dlib|PATH")]
Like = Annotated[Path | None, tyro.conf.arg(metavar="RUN")]

_CORPUS_HELP = """{about}

    Faces are aligned by landmarks or by their eyes, the sound is resampled, and speakers are
    divided into train, val and test (with one or two speakers, clips are). A clip of 3 s takes
    2.8 MB of disk and about 0.7 s of one core. Clips that cannot be used are skipped and listed;
    longer ones are cut into pieces; other frame rates are resampled to {fps:g}, and remarks say
    what was done to a clip or is odd about it. Run again, the command does only what is missing.
    No mirrored copies are made: training mirrors clips at random (python -m train --mirror, which
    the presets paper and small set).

    Args:
        raw: Folder that holds {layout}, at any depth.
        out: Folder to write the prepared set to. Its splits.json has the speakers of each split.
        sample_rate: Rate of the sound in Hz, a multiple of 1000.
        fps: Rate of the video in frames per second.
        size: Height and width of the aligned frames in pixels, even.
        seed: Seed of the division into splits.
        splits: JSON file {{"train": [SPEAKER, ...], "val": [...], "test": [...]}} to divide by
            instead. A set that is there is divided anew, without preparing its clips again.
        speakers: CSV file with the columns file,speaker, files relative to RAW, that says instead
            of folders and names who speaks; only the files in it are prepared.
        min_frames: Least number of frames; shorter clips are skipped.
        clip_seconds: Longest clip in seconds; longer ones are cut into pieces of this length.
        landmarks: Source of the points that faces are aligned by: dlib, the 68-point predictor of
            the extra faces, frame by frame (its training pictures exclude commercial use); haar,
            OpenCV's eye detector, coarser; the path of another 68-point predictor (*.dat); or auto,
            dlib where it is installed and haar elsewhere.
        align_as: Run directory whose mean face faces are aligned to: one that python -m train.sda
            made of a published checkpoint.
        max_gb: Greatest size of a decoded clip, or of a piece of one, in GB of memory; larger ones
            are skipped, as are those that break either limit below.
        max_seconds: Greatest length of a video in seconds.
        max_megapixels: Greatest size of a picture in millions of pixels.
        workers: Number of processes; one per core, and at least two, if not given. A clip that
            breaks its process, say for want of memory, is skipped, unless 1 does all in this one.

    Returns:
        ``out``.

    Raises:
        DataError: an argument is wrong, ``out`` holds a set made with other settings, or no clip
            can be used.
"""


def _command(corpus: Corpus) -> Callable[..., Path]:
    """The subcommand that prepares ``corpus``."""

    def prepare(
        raw: Raw,
        out: Out,
        *,
        sample_rate: int = corpus.sample_rate,
        fps: float = corpus.fps,
        size: tuple[int, int] = (128, 96),
        seed: int = 0,
        splits: File = None,
        speakers: File = None,
        min_frames: int = corpus.min_frames,
        clip_seconds: float = 3.0,
        landmarks: Landmarks = "auto",
        align_as: Like = None,
        max_gb: float = Limits.decoded_bytes / 1e9,
        max_seconds: float = Limits.seconds,
        max_megapixels: float = Limits.pixels / 1e6,
        workers: Workers = None,
    ) -> Path:
        positive = {"fps": fps, "min-frames": min_frames, "clip-seconds": clip_seconds}
        bounds = {"max-gb": max_gb, "max-seconds": max_seconds, "max-megapixels": max_megapixels}
        _check(sample_rate, size, seed, positive={**positive, **bounds, "workers": workers})
        limits = Limits(max_gb * 1e9, max_seconds, round(max_megapixels * 1e6))
        max_frames = round(clip_seconds * fps)
        if max_frames < min_frames:
            raise DataError(
                f"clip-seconds {clip_seconds:g} is {max_frames} frames at {fps:g} fps, fewer than "
                f"min-frames {min_frames}"
            )
        raw, out = Path(raw), Path(out)
        chosen = None if splits is None else read_splits(splits)
        aligner = choose(landmarks)
        places = None if align_as is None else _places(align_as)
        settings = {
            "source": corpus.key,
            "fps": float(fps),
            "sample_rate": sample_rate,
            "size": list(size),
            "seed": seed,
            "min_frames": min_frames,
            "clip_seconds": float(clip_seconds),
            "splits": chosen,
            "landmarks": aligner,
            "places": places,
        }
        sources = corpus.find(raw)
        if speakers is not None:
            sources = told(sources, speakers, raw)
        options = {"fps": float(fps), "sample_rate": sample_rate, "size": size}
        options |= {"min_frames": min_frames, "max_frames": max_frames, "landmarks": aligner}
        options |= {"limits": limits}
        options["places"] = places
        jobs, skipped = _corpus_jobs(sources, out, options)
        assigned = corpus.divide(jobs, seed, chosen, f"{splits}")
        jobs = {key: job for key, job in jobs.items() if key in assigned}
        seconds = expected_seconds(sources)
        _prepare(out, settings, jobs, lambda _: assigned, skipped, workers, seconds)
        write_splits(out / SPLITS_FILE, assigned)
        print(f"faces aligned by {describe(aligner)}")
        return out

    texts = {"about": corpus.about, "layout": corpus.layout, "fps": corpus.fps}
    prepare.__doc__ = _CORPUS_HELP.format(**texts)
    return prepare


prepare_grid, prepare_crema_d = _command(GRID), _command(CREMA_D)
prepare_tcd_timit, prepare_any = _command(TCD_TIMIT), _command(ANY)


def _places(run: Path) -> list[list[float]]:
    """The places that the faces of ``run`` were aligned to, as JSON values."""
    places = load_config(run).places
    if places is None:
        raise DataError(f"align-as {run}: its faces have the usual places; leave --align-as out")
    return [list(place) for place in places]


def _corpus_jobs(
    sources: list[Source], out: Path, options: dict[str, Any]
) -> tuple[dict[tuple[str, str], Job], list[dict[str, str]]]:
    """A job for every clip, by (speaker, name), and what is skipped at once."""
    copies: dict[tuple[str, str], list[Source]] = {}
    skipped = []
    for source in sources:
        if source.problem:
            skipped.append({"file": str(source.path), "reason": source.problem})
        else:
            copies.setdefault((source.speaker, source.name), []).append(source)
    jobs: dict[tuple[str, str], Job] = {}
    for key, (first, *others) in copies.items():
        whole = (first.speaker, whole_name(first.name)[0])
        if whole != key and whole in copies:
            reason = f"called like a piece of {copies[whole][0].path}; rename it"
            skipped += [{"file": str(copy.path), "reason": reason} for copy in copies[key]]
            continue
        reason = f"the same clip as {first.path}, needed only if that cannot be used"
        skipped += [{"file": str(other.path), "reason": reason} for other in others]
        folder = out / "clips" / first.speaker
        make = functools.partial(prepare_first, [first, *others], folder, **options)
        jobs[key] = Job(str(first.path), make)
    return jobs, skipped


def prepare_synthetic(
    out: Out,
    *,
    clips: int = 200,
    speakers: int = 40,
    seed: int = 0,
    seconds: float = 3.0,
    fps: float = 25.0,
    sample_rate: int = 16000,
    size: tuple[int, int] = (128, 96),
    motion: float = 1.0,
    workers: Workers = None,
) -> Path:
    """Render synthetic talking faces, whose lip movement and blinks are known exactly.

    Example: python -m train.prepare synthetic data/synthetic --clips 200 --speakers 40

    Speakers are divided into train, val and test 16 : 7 : 10.

    Args:
        out: Folder to write; if it holds the complete set already, nothing is done.
        clips: Number of clips; one of 3 s takes 2.8 MB of disk.
        speakers: Number of different faces and voices.
        seed: Seed of everything that is drawn at random; the same seed gives the same clips.
        seconds: Length of a clip in seconds.
        fps: Rate of the video in frames per second.
        sample_rate: Rate of the sound in Hz, a multiple of 1000.
        size: Height and width of the frames in pixels, even.
        motion: Amount of movement of the heads, 0 to 3; 0 holds them still, as alignment of every
            frame does.
        workers: Number of processes; one per core if not given.

    Returns:
        ``out``.

    Raises:
        DataError: an argument is wrong or ``out`` holds a set made with other settings.
    """
    positive = {"clips": clips, "speakers": speakers, "seconds": seconds, "fps": fps}
    _check(sample_rate, size, seed, positive={**positive, "workers": workers})
    if seconds * fps < 1:
        raise DataError(f"{seconds:g} seconds at {fps:g} fps is less than one frame")
    if not 0 <= motion <= 3:
        raise DataError(f"motion {motion:g}: expected a number from 0 to 3")
    out = Path(out)
    settings = {
        "source": "synthetic",
        "fps": float(fps),
        "sample_rate": sample_rate,
        "size": list(size),
        "seed": seed,
        "clips": clips,
        "speakers": speakers,
        "seconds": float(seconds),
        "motion": float(motion),
    }
    done = _claim(out, settings)
    if done and done["complete"] and all((out / clip["file"]).is_file() for clip in done["clips"]):
        return out
    options = {
        **{key: value for key, value in settings.items() if key not in ("source", "clips")},
        "size": size,
    }
    # Only the renderer knows whose clip it is; the name alone identifies a clip here.
    jobs = {
        ("", f"{index:05d}"): Job(
            f"synthetic clip {index}", functools.partial(_render, out, index, options)
        )
        for index in range(clips)
    }
    return _prepare(out, settings, jobs, lambda keys: draw_splits(keys, seed), [], workers, seconds)


def _render(out: Path, index: int, options: dict[str, Any]) -> list[Path]:
    clip = replace(render_clip(index, **options), name=f"{index:05d}")
    target = out / "clips" / clip.speaker / f"{clip.name}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_clip(target, clip)
    return [target]


def _check(
    sample_rate: int, size: tuple[int, int], seed: int, *, positive: dict[str, float | int | None]
) -> None:
    if sample_rate < 1000 or sample_rate % 1000:
        raise DataError(
            f"sample rate {sample_rate} Hz is not a multiple of 1000 Hz, which the audio "
            "encoder's layers need; use 16000, or 40000 for the published GRID model"
        )
    if len(size) != 2 or any(side < 2 or side % 2 for side in size):
        raise DataError(
            f"size {' '.join(map(str, size))} must be height and width, positive and even; "
            "the models use 128 96"
        )
    if seed < 0:
        raise DataError(f"seed must not be negative, got {seed}")
    for name, value in positive.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise DataError(f"{name} must be greater than 0 and finite, got {value}")


def _claim(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Check ``out``; its manifest if it is a set of the same settings, or None if it is new.

    A corpus may be divided anew: its clips are the same.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"OUT {out} is a file; give a new directory or one prepared earlier")
    if (out / MANIFEST).exists():
        manifest = read_manifest(out, "choose another OUT or delete it")
        made = manifest.get("settings", {})
        for key in sorted(settings.keys() | made.keys()):
            free = key in ("seed", "splits") and settings["source"] != "synthetic"
            if not free and made.get(key) != settings.get(key):
                raise DataError(
                    f"{out} was prepared with {key} = {made.get(key)}, not {settings.get(key)}; "
                    "choose another OUT, repeat the earlier settings, or delete it"
                )
        return manifest
    if (out / "clips").exists():
        raise DataError(f"{out} has clips but no {MANIFEST}; choose another OUT or delete it")
    return None


def _write_manifest(
    out: Path,
    settings: dict[str, Any],
    clips: list[dict[str, Any]],
    skipped: list[dict[str, str]],
    complete: bool,
) -> None:
    manifest = {
        "version": MANIFEST_VERSION,
        **{key: settings[key] for key in ("source", "fps", "sample_rate", "size")},
        "settings": settings,
        "complete": complete,
        "skipped": skipped,
        "clips": clips,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / MANIFEST, manifest, indent=1)
    except OSError as error:
        raise DataError(f"cannot write into {out}: {error.strerror}") from None


def _prepare(
    out: Path,
    settings: dict[str, Any],
    jobs: dict[tuple[str, str], Job],
    split: Callable[[list[tuple[str, str]]], Splits],
    skipped: list[dict[str, str]],
    workers: int | None,
    seconds: float,
) -> Path:
    """Do the jobs whose clip is not there yet; write manifest, contact sheet and summary.

    ``seconds`` is the mean length that is expected of a clip, for the disk that will be needed.
    """
    began = time.monotonic()
    before = _claim(out, settings)
    if before is None:
        _write_manifest(out, settings, [], [], complete=False)

    anonymous = all(speaker == "" for speaker, _ in jobs)
    done = {}
    pieces: dict[tuple[str, str], dict[Path, dict[str, Any]]] = {}
    for path, header in _finished(out, settings):
        key = ("" if anonymous else header["speaker"], header["name"])
        if key in jobs:
            done[path] = header
            del jobs[key]
            continue
        name, count = whole_name(header["name"])
        files = pieces.setdefault((header["speaker"], f"{name} {count}"), {})
        files[path] = header
        if len(files) == count and (header["speaker"], name) in jobs:
            del jobs[header["speaker"], name]
            done |= files
    kept, complete = len(done), False
    _check_disk(out, settings, len(jobs) * seconds)
    workers = min(workers or max(2, usable_cores()), max(1, len(jobs)))
    try:
        with (
            closing(run_jobs(jobs.values(), workers)) as outcomes,
            tqdm(total=len(jobs) + kept, initial=kept, unit="clip", disable=not jobs) as bar,
        ):
            for job, made, reason, _ in outcomes:
                if made is None:
                    reason = reason.removeprefix(f"{job.name}: ")
                    skipped.append({"file": job.name, "reason": reason})
                    bar.set_postfix(skipped=len(skipped))
                else:
                    done |= {path: read_header(path) for path in made}
                bar.update()
        complete = True
    except OSError as error:
        raise DataError(f"cannot write into {out}: {error.strerror or error}") from None
    finally:
        clips = _entries(out, done, split)
        skipped.sort(key=lambda skip: skip["file"])
        _write_manifest(out, settings, clips, skipped, complete)
    _summarise(clips, skipped)
    _say_who_moved(before["clips"] if before else [], clips)
    if not clips:
        raise DataError(f"none of the {len(skipped)} clips can be used; nothing was prepared")
    shown = _shown(clips)
    write_contact_sheet(
        out / "contact.png",
        (read_clip(out / clip["file"]).frames for clip in shown),
        [f"{clip['speaker']}/{clip['name']} {clip['split']}" for clip in shown],
    )
    size = sum(path.stat().st_size for path in done) / 1e9
    print(
        f"{len(clips)} clips in {out} ({kept} were there before), {size:.2f} GB, "
        f"{time.monotonic() - began:.0f} s; look at {out / 'contact.png'}"
    )
    return out


def _check_disk(out: Path, settings: dict[str, Any], seconds: float) -> None:
    """Raise ``DataError`` unless so many seconds of clips fit on the disk of ``out``."""
    picture = 3 * math.prod(settings["size"])
    need = seconds * (settings["fps"] * picture + 2 * settings["sample_rate"])
    free = shutil.disk_usage(out).free
    if need > free:
        raise DataError(
            f"the clips that are missing need about {need / 1e9:.2f} GB and {out} has "
            f"{free / 1e9:.2f} GB free; choose another OUT, free some, or prepare fewer clips"
        )


def _finished(out: Path, settings: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The intact clip files of ``out`` with their headers."""
    for path in sorted(out.glob("clips/*/*.safetensors")):
        try:
            header = read_header(path)
        except DataError:
            continue  # cut short by a crash of the machine; it is made again
        if all(header[key] == settings[key] for key in ("fps", "sample_rate", "size")):
            yield path, header


def _entries(
    out: Path,
    done: dict[Path, dict[str, Any]],
    split: Callable[[list[tuple[str, str]]], Splits],
) -> list[dict[str, Any]]:
    assigned = split([(header["speaker"], header["name"]) for header in done.values()])
    clips = []
    for path, header in done.items():
        speaker, name = header["speaker"], header["name"]
        whole = (speaker, name if (speaker, name) in assigned else whole_name(name)[0])
        entry = {"name": name, "speaker": speaker, "split": assigned[whole]}
        entry |= {"file": path.relative_to(out).as_posix()}
        entry |= {key: header[key] for key in ("frames", "samples", "checksum")}
        entry |= {"remarks": header["remarks"]} if header["remarks"] else {}
        clips.append(entry)
    return sorted(clips, key=lambda entry: entry["file"])


def _summarise(clips: list[dict[str, Any]], skipped: list[dict[str, str]]) -> None:
    print(f"{'split':<8}{'clips':>8}{'speakers':>10}{'frames':>10}")
    for split in SPLITS:
        chosen = [clip for clip in clips if clip["split"] == split]
        speakers = len({clip["speaker"] for clip in chosen})
        frames = sum(clip["frames"] for clip in chosen)
        print(f"{split:<8}{len(chosen):>8}{speakers:>10}{frames:>10}")
    remarks = [remark for clip in clips for remark in clip.get("remarks", ())]
    kinds = Counter(remark.partition(":")[0] for remark in remarks)
    if kinds:
        print(f"clips with remarks, which {MANIFEST} has in full:")
    for kind, count in kinds.most_common():
        example = next(remark for remark in remarks if remark.partition(":")[0] == kind)
        print(f"{count:>7}  {example}")
    if skipped:
        print(f"skipped {len(skipped)}:")
    for skip in skipped[:SKIPPED_SHOWN]:
        print(f"  {skip['file']}: {skip['reason']}")
    if len(skipped) > SKIPPED_SHOWN:
        print(f"  ... and {len(skipped) - SKIPPED_SHOWN} more, see {MANIFEST}")


def _say_who_moved(before: list[dict[str, Any]], clips: list[dict[str, Any]]) -> None:
    """Print whose clips have another split than before, which spoils what was trained on them."""
    was = {(clip["speaker"], clip["name"]): clip["split"] for clip in before}
    moved = {
        clip["speaker"]: f"{clip['speaker']} from {split} to {clip['split']}"
        for clip in clips
        if (split := was.get((clip["speaker"], clip["name"]), clip["split"])) != clip["split"]
    }
    if moved:
        print(f"divided otherwise than before, so train anew: {', '.join(moved.values())}")


def _shown(clips: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Up to 64 clips: every speaker's first one, however many there are, then second ones, …"""
    turns: Counter[str] = Counter()
    ranked = []
    for clip in clips:
        ranked.append((turns[clip["speaker"]], clip["file"], clip))
        turns[clip["speaker"]] += 1
    ranked = sorted(ranked, key=lambda item: item[:2])[: max(CONTACT_CLIPS, len(turns))]
    return sorted((clip for *_, clip in ranked), key=lambda clip: clip["file"])


def main() -> int:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command = functools.partial(
        tyro.extras.subcommand_cli_from_dict,
        {
            "grid": prepare_grid,
            "crema-d": prepare_crema_d,
            "tcd-timit": prepare_tcd_timit,
            "any": prepare_any,
            "synthetic": prepare_synthetic,
        },
        prog="python -m train.prepare",
        description="Prepare training data. Example: python -m train.prepare grid RAW OUT",
    )
    return run(command, "the same command continues where this one was")


if __name__ == "__main__":
    sys.exit(main())
