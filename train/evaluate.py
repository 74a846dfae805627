"""One row of the paper's Table 1: a run's model on speakers it has never seen, or any videos.

    python -m train.evaluate RUN --syncnet syncnet.safetensors --embedder embedder.safetensors
    python -m train.evaluate RUN --ground-truth                 the real clips' own row
    python -m train.evaluate GENERATED.mp4 --real REAL.mp4      videos, or two folders of them

In folders, videos belong together whose names are equal but for the suffix; those that cannot be
paired or measured are named and left out. Videos without sound have the columns that need none.

Make the two networks with python -m train.syncnet and python -m train.embedder; without them
their columns are dashes. With the extra faces, dlib measures mouths, and of real faces blinks and
identity too. The row is printed beside those of the still repeated, the speaker's mean frame and
the real video, which say what it is worth, and kept with them as RUN/evaluation.json.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from model.config import Kernels
from train.baselines import REAL, SpeakerMeans, baselines
from train.config import CONFIG_FILE, TrainConfig, check_seed
from train.data.batches import by_turns, open_set
from train.data.landmarks import choose
from train.data.media import MediaError, load_media
from train.data.prepared import PreparedSet, read_manifest
from train.device import Batch, clip_to_device, pick_device
from train.errors import UserError, one_line, run
from train.files import as_json, write_json
from train.metrics.faces import FaceEmbedder, FaceReader
from train.metrics.identity import load_embedder
from train.metrics.score import MetricError, Score, check_rates
from train.metrics.syncnet import load_ours, load_published
from train.metrics.table import COLUMNS, NO_READER, Meters, Pair, Row, Tally, to_json
from train.metrics.weights import claim_file
from train.run.checkpoint import load_run, run_of
from train.run.samples import to_uint8
from train.source import find_data

EVALUATION_FILE = "evaluation.json"
GENERATED = "generated"  # the title of the row of a model or of videos
VIDEOS = (".mp4", ".m4v", ".mkv", ".mov", ".avi", ".mpg", ".mpeg", ".webm")
SAMPLE_RATE = 16000  # Hz, of the sound of video files


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a run's model, or videos, by the columns of the paper's Table 1."""

    target: Annotated[Path, tyro.conf.Positional]
    """Run directory, or one of its checkpoints, to measure; with --real, a generated video or a
    folder of them."""
    real: Path | None = None
    """Real video of the generated one, or a folder with files of the same names, but for the
    suffix."""
    allow_shorter: bool = False
    """Measure generated videos of one frame fewer than the real one too, on the frames of both."""
    ground_truth: bool = False
    """Measure the real clips themselves instead of what the model makes of their stills."""
    data: str | None = None
    """Clips to measure on: synthetic (the built-in set) or the directory of a prepared set; by
    default the run's own."""
    split: Literal["train", "val", "test"] = "test"
    """Split to measure on; the speakers of test are in no other, unless the set has only two."""
    clips: int = 60
    """Greatest number of clips to measure, every speaker's first one before any second one."""
    syncnet: Path | None = None
    """File of our SyncNet, which python -m train.syncnet makes, for AV offset and confidence."""
    published_syncnet: Path | None = None
    """File of the published SyncNet, the state dict syncnet_v2.model, to use instead of ours."""
    landmarks: str = "auto"
    """Landmarks that measure mouths, and blinks and identity of real faces: dlib (of the extra
    faces), the path of another 68-point predictor, none, or auto (dlib where it is installed)."""
    baselines: bool = True
    """Measure the rows beside: the still repeated, the speaker's mean frame and the real video."""
    embedder: Path | None = None
    """File of our identity embedder, which python -m train.embedder makes, for ACD of the built-in
    faces; real ones are measured by dlib's network where there are landmarks."""
    masked: bool = False
    """Leave out of AV sync what it would compare with the silence beyond a clip's ends."""
    out: Path | None = None
    """JSON file to write (default: evaluation.json in the run directory; none for videos)."""
    kernels: Kernels = "auto"
    """Kernels that compute the fused operators. An explicit choice works or says why not."""
    device: str = "auto"
    """Device to compute on: auto (a GPU if there is one), cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of the noise; clip i has that of seed + i."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.clips < 1:
            raise UserError(f"--clips {self.clips}: expected a positive number")
        if self.syncnet is not None and self.published_syncnet is not None:
            raise UserError("--syncnet and --published-syncnet: give one of them")


def evaluate(config: EvaluateConfig) -> Row:
    """Measure, print and keep a row and those beside it; return the row.

    UserError, DataError or MetricError for what cannot be measured.
    """
    device = pick_device(config.device)
    out, norm = config.out, None
    clips: list[dict[str, Any]]
    pairs: Iterator[Pair | UserError]
    unpaired: list[str] = []
    means: SpeakerMeans | None = None
    if out is not None:
        claim_file(out)
    if config.real is not None:
        if config.ground_truth:
            raise UserError("--ground-truth and --real: give one of them")
        files, unpaired = video_files(config.target, config.real)
        pairs, count = video_pairs(files, device, config.allow_shorter), len(files)
        clips = [{} for _ in files]
        what = f"{count} {'videos' if count > 1 else 'video'} of {config.target}"
        meters = load_meters(config, eyes=False, device=device)
    else:
        place = run_of(config.target)
        if not (place / CONFIG_FILE).is_file() and config.target.suffix.lower() in VIDEOS:
            raise UserError(f"{config.target}: a video needs its real one: --real REAL")
        run, model = load_run(config.target, device, config.kernels)
        root = find_data(run if config.data is None else dataclasses.replace(run, data=config.data))
        data = whole_clips(run, root, config.split, config.clips)
        eyes = read_manifest(root).get("source") == "synthetic"
        meters = load_meters(config, eyes=eyes, device=device)
        name = "ground-truth.json" if config.ground_truth else EVALUATION_FILE
        if place != config.target:  # beside the run's own
            name = f"{config.target.stem}-{name}"
        out = out or place / name
        what = f"{len(data)} {config.split} clips of {len(data.speakers)} speakers of {root}"
        fusion: Any = getattr(model, "fusion", None)
        if fusion is not None and list(fusion.parameters()) and not config.ground_truth:
            norm = float(fusion.frobenius_penalty())
        count, clips = len(data), data.clips
        means = SpeakerMeans(root, data.size)
        pairs = clip_pairs(None if config.ground_truth else model, data, device, config.seed)
    own = REAL if config.ground_truth else GENERATED
    tallies = {own: Tally(meters)}
    with tqdm(pairs, total=count, unit="clip", dynamic_ncols=True, leave=False) as bar:
        for pair, clip in zip(bar, clips, strict=True):
            problem = pair if isinstance(pair, UserError) else measure(tallies[own], pair)
            if problem is not None:
                if config.real is None or count == 1:
                    raise problem
                bar.write(f"left out: {one_line(problem)}", file=sys.stderr)
                tallies[own].leave_out(one_line(problem))
                continue
            assert isinstance(pair, Pair)
            for title, other in baselines(pair, clip, means) if config.baselines else ():
                tally = tallies.setdefault(title, Tally(meters))
                if isinstance(other, Score):
                    tally.leave_out(other.reason)
                else:
                    tally.add(other)
    for name in unpaired:
        tallies[own].leave_out(f"no real video of {name}")
    rows = {title: tally.row() for title, tally in tallies.items()}
    row = rows[own]
    show(rows, meters, what)
    if out is not None:
        record = {
            "row": to_json(row),
            "baselines": {title: to_json(rows[title]) for title in rows if title != own},
            "fusion_norm": norm,
            "networks": meters.titles(),
            "of": what,
            "settings": as_json(dataclasses.asdict(config)),
        }
        try:
            write_json(out, record)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    return row


def measure(tally: Tally, pair: Pair) -> MetricError | None:
    """Add a clip to a row; return why it cannot be measured, if so."""
    try:
        tally.add(pair)
    except MetricError as error:
        return error
    return None


def whole_clips(config: TrainConfig, root: Path, split: str, count: int) -> PreparedSet:
    """Open whole clips at the model's size, at most ``count``, spread over the speakers."""
    return by_turns(open_set(root, split, config.model), count)


@torch.no_grad()
def animate(model: nn.Module, batch: Batch, seed: int) -> Tensor:
    """(T, 3, H, W) uint8: what a model makes of the still and the sound of one clip."""
    rng = torch.Generator().manual_seed(seed)
    frames = model(batch.still, batch.audio, rng)[0]
    return torch.from_numpy(to_uint8(frames)).to(frames.device)


def clip_pairs(
    model: nn.Module | None, data: PreparedSet, device: torch.device, seed: int
) -> Iterator[Pair]:
    """Every clip with what the model makes of it, or with itself if there is no model."""
    for index in tqdm(range(len(data)), unit="clip", dynamic_ncols=True, leave=False):
        item = data[index]
        made = real = item["frames"].to(device)
        if model is not None:
            made = animate(model, clip_to_device(item, device), seed + index)
            real = real[: len(made)]
        clip = data.clips[index]
        name = f"{clip['speaker']}/{clip['name']}"
        audio = item["audio"].numpy()
        yield Pair(made, real, audio, data.fps, data.sample_rate, name, clip["speaker"])


def video_files(made: Path, real: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """The generated and real files to compare, and the generated ones that have no real one.

    Two files, or those of folders whose names are equal but for the suffix. What cannot be paired
    is printed.
    """
    if made.is_dir() != real.is_dir():
        raise UserError(f"{made} and --real {real}: expected two files or two folders")
    if not made.is_dir():
        return [(made, real)], []
    ours, theirs = videos_in(made), videos_in(real)
    pairs, unpaired = [], []
    for path in ours:
        same = [other for other in theirs if other.stem == path.stem]
        same = [other for other in same if other.name == path.name] or same
        if len(same) > 1:
            several = ", ".join(other.name for other in same)
            raise UserError(f"{real}: {several} all are real videos of {path}; keep one of them")
        if same:
            pairs.append((path, same[0]))
        else:
            unpaired.append(path.name)
    missed = sorted({path.stem for path in theirs} - {path.stem for path in ours})
    for names, what, where in ((unpaired, "real", real), (missed, "generated", made)):
        if names:
            print(f"no {what} video in {where} of: {', '.join(names)}", file=sys.stderr)
    if not pairs:
        raise UserError(f"{made} and --real {real}: no two videos have one name but for the suffix")
    return pairs, unpaired


def videos_in(folder: Path) -> list[Path]:
    """The videos of a folder by name; UserError if there are none."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEOS)
    if not found:
        raise UserError(f"{folder}: no videos there ({', '.join(VIDEOS)})")
    return found


def video_pairs(
    files: list[tuple[Path, Path]], device: torch.device, allow_shorter: bool
) -> Iterator[Pair | UserError]:
    """Generated videos with the real ones, or why they cannot be read."""
    for made, real in files:
        try:
            yield read_pair(made, real, device, allow_shorter)
        except (MediaError, MetricError) as error:
            yield error


def read_pair(made: Path, real: Path, device: torch.device, allow_shorter: bool) -> Pair:
    """Read a generated video and the real one; the sound is the generated one's."""
    one, other = (load_media(path, SAMPLE_RATE, need_sound=False) for path in (made, real))
    try:
        check_rates([one.fps, other.fps])
    except MetricError as error:
        raise MetricError(f"{made}: {error}") from None
    pictures, truth = (
        torch.from_numpy(np.ascontiguousarray(media.frames.transpose(0, 3, 1, 2))).to(device)
        for media in (one, other)
    )
    if allow_shorter and len(pictures) == len(truth) - 1:
        tqdm.write(f"{made}: one frame fewer, {len(pictures)} are compared", file=sys.stderr)
        truth = truth[:-1]
    return Pair(pictures, truth, one.audio, one.fps, SAMPLE_RATE, str(made))


def load_meters(config: EvaluateConfig, *, eyes: bool, device: torch.device) -> Meters:
    """The measuring networks that were asked for."""
    embedder: Any = load_embedder(config.embedder, device) if config.embedder else None
    syncnet: Any = None
    if config.syncnet is not None:
        syncnet = load_ours(config.syncnet, device)
    elif config.published_syncnet is not None:
        syncnet = load_published(config.published_syncnet, device)
    landmarks = "haar" if config.landmarks == "none" else choose(config.landmarks)
    if landmarks == "haar":
        if config.landmarks == "haar":
            raise UserError("--landmarks haar: no landmarks; expected auto, dlib, none or a path")
        missing = "--landmarks none" if config.landmarks == "none" else NO_READER
        return Meters(embedder, syncnet, eyes, config.masked, no_faces=missing)
    if not eyes:
        embedder = FaceEmbedder(landmarks)
    return Meters(embedder, syncnet, eyes, config.masked, FaceReader(landmarks))


def show(rows: dict[str, Row], meters: Meters, what: str) -> None:
    """Print rows side by side, a metric a line, then what measured and the reason of every dash."""
    print(what)
    notes: list[str] = []
    print(" " * 22 + "".join(f"{title:>17}" for title in rows))
    for column in COLUMNS:
        line = f"  {column.title:<20}"
        for row in rows.values():
            score = row[column.key]
            text = "-" if score.value is None else format(score.value, column.form)
            if score.reason and score.reason not in notes:
                notes.append(score.reason)
            mark = f"[{notes.index(score.reason) + 1}]" if score.reason else ""
            line += f"{text:>12}{mark:<5}"
        print(line.rstrip())
    for key, title in meters.titles().items():
        if title is not None:
            print(f"  {key} measured by: {title}")
    for number, note in enumerate(notes, 1):
        print(f"  [{number}] {note}")


def main() -> int:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    description = inspect.cleandoc(__doc__ or "")
    return run(
        lambda: evaluate(
            tyro.cli(EvaluateConfig, prog="python -m train.evaluate", description=description)
        )
    )


if __name__ == "__main__":
    sys.exit(main())
