"""A procedural talking-head set: painted faces that utter synthetic speech. Nothing to download.

Every speaker has a face, a voice and an articulation. The mouth is the product of what is said and
who says it: openness = OPENING * articulation[jaw] * jaw_drive(audio), and so for the other lip
gestures, so a model must combine audio and identity multiplicatively to get it right. The
articulation is a smooth function of the visible face (``Identity.articulation``).

    clip = render_clip(7, seed=0)        # speaker07, 3 s at 25 fps, 128 x 96, sound at 16 kHz
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from scipy.ndimage import gaussian_filter1d

from train.data.prepared import Clip
from train.data.synthetic.easel import CENTRE_X, DESIGN_HEIGHT, DESIGN_WIDTH, EYE_SPREAD
from train.data.synthetic.face import paint_backdrop, paint_head
from train.data.synthetic.identity import Identity, draw_identity
from train.data.synthetic.moving import Mouth, draw_eyes, draw_mouth, lower_jaw
from train.data.synthetic.speech import Utterance, speak

OPENING = 11.0  # design pixels, inner mouth height at a full jaw drive and a jaw gain of 1
BLINK_RATE = 0.28  # per second
BLINK_SECONDS = (0.2, 0.4)
REFRACTORY = 0.5  # s, from the end of a blink to the next
AWAKE = 0.2  # s without a blink at the start, so that the first frame has open eyes
OVERSAMPLING = 2  # canvas pixels to the output pixel


def speaker_identity(speaker: int, *, seed: int = 0) -> Identity:
    """The identity of a speaker: the same for the same (seed, speaker), whatever else changes."""
    return draw_identity(np.random.default_rng([seed, 0, speaker]))


def draw_blinks(rng: np.random.Generator, seconds: float, rate: float = BLINK_RATE) -> np.ndarray:
    """(K, 2) float32 start and end times, in s, of whole blinks within a clip.

    Blinks last 0.2 to 0.4 s and start as a Poisson process with a refractory pause of 0.5 s.
    None starts before 0.2 s or ends after the clip; the intensity between makes up for both, so
    that on average a clip longer than a second has rate * seconds blinks.
    """
    eligible = max(seconds - AWAKE - sum(BLINK_SECONDS) / 2, 0.5 * seconds)
    period = eligible / (rate * seconds)  # s, mean time from one start to the next
    waiting = max(period - sum(BLINK_SECONDS) / 2 - REFRACTORY, 0.0)
    blinks = []
    clock = -10.0  # a run-in makes the process stationary over the clip
    while clock < seconds:
        start = clock + rng.exponential(waiting)
        end = start + rng.uniform(*BLINK_SECONDS)
        if start >= AWAKE and end <= seconds:
            blinks.append((start, end))
        clock = end + REFRACTORY
    return np.asarray(blinks, np.float32).reshape(-1, 2)


def eyelids(blinks: np.ndarray, times: np.ndarray, fps: float) -> np.ndarray:
    """(T,) float32 eye openness in 0..1 at ``times``: 0 around the middle of each of ``blinks`` (K,
    2).

    Lids stay closed for a fifth of the blink and at least one frame, and move smoothly before and
    after it.
    """
    openness = np.ones(len(times), np.float32)
    for start, end in blinks:
        half = 0.5 * (end - start)
        closed = min(max(0.2 * half, 0.51 / fps), 0.9 * half)
        x = np.clip((np.abs(times - 0.5 * (start + end)) - closed) / (half - closed), 0.0, 1.0)
        openness = np.minimum(openness, x * x * (3.0 - 2.0 * x)).astype(np.float32)
    return openness


def articulate(who: Identity, said: Utterance) -> Mouth:
    """The mouth of this speaker saying this: audio-driven gestures times the articulation."""
    jaw, spread, narrow, *_ = who.articulation.tolist()
    rounding = np.clip(-said.spread, 0.0, 1.0)
    rest = 25.0 + 9.0 * who.lip_width
    stretch = 1.0 + 0.24 * spread * said.spread - 0.2 * narrow * said.jaw
    return Mouth(OPENING * jaw * said.jaw, rest * stretch, rounding)


def _lip_shape(mouth: Mouth) -> np.ndarray:
    """(T, 3) shape of the lips, as ``train.data.landmarks.lip_shape`` measures it on real faces."""
    moving = np.column_stack([mouth.openness, mouth.width])
    centred = moving - moving.mean(0)
    return np.column_stack([mouth.openness, centred]) / (2 * EYE_SPREAD)


def _wander(rng: np.random.Generator, times: np.ndarray, fastest: float) -> np.ndarray:
    """(T,) smooth noise of standard deviation about 0.5, clipped to -1..1, below ``fastest`` Hz."""
    frequency = rng.uniform(0.1, fastest, 4)
    phase = rng.uniform(0, 2 * np.pi, 4)
    waves = np.sin(2 * np.pi * frequency * times[:, None] + phase)
    return np.clip(waves.mean(axis=1) * 1.4, -1.0, 1.0)


def _gaze(rng: np.random.Generator, count: int, fps: float) -> np.ndarray:
    """(T, 2) float32 iris shifts in design pixels: fixations of about a second, quick saccades."""
    fixation = np.cumsum(rng.random(count) < 1.0 / fps)
    targets = rng.normal(0.0, 1.0, (fixation[-1] + 1, 2)) * (0.8, 0.3)
    return gaussian_filter1d(targets[fixation], 0.02 * fps, axis=0).astype(np.float32)


def _render(
    who: Identity,
    mouth: Mouth,
    eyes: np.ndarray,
    gaze: np.ndarray,
    pose: np.ndarray,
    size: tuple[int, int],
) -> np.ndarray:
    """(T, 3, H, W) uint8; pose (T, 3): right, down in design pixels and roll in radians."""
    height, width = size
    scale = OVERSAMPLING * max(height / DESIGN_HEIGHT, width / DESIGN_WIDTH)
    head = paint_head(who, scale).astype(np.uint8)
    lower = lower_jaw(head, mouth.openness, who, scale)
    draw_mouth(lower, mouth, who, scale)
    patches = draw_eyes(head, eyes, gaze, who, scale)
    backdrop = cv2.resize(paint_backdrop(who, scale), (width, height), interpolation=cv2.INTER_AREA)

    y = (np.arange(height, dtype=np.float32)[:, None] + 0.5) * (DESIGN_HEIGHT / height)
    x = (np.arange(width, dtype=np.float32)[None, :] + 0.5) * (DESIGN_WIDTH / width)
    pivot_x, pivot_y = CENTRE_X, 96.0  # the head turns about the top of the neck
    top = head.shape[0] - lower.shape[1]
    frames = np.empty((len(eyes), 3, height, width), np.uint8)
    for t, (right, down, roll) in enumerate(pose.astype(np.float32)):
        head[top:] = lower[t]
        for rows, columns, patch in patches:
            head[rows, columns, :3] = patch[t]
        dx, dy = x - pivot_x - right, y - pivot_y - down
        map_x = (math.cos(roll) * dx + math.sin(roll) * dy + pivot_x) * scale - 0.5
        map_y = (math.cos(roll) * dy - math.sin(roll) * dx + pivot_y) * scale - 0.5
        moved = cv2.remap(head, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        behind = backdrop * (1.0 - moved[..., 3:] * np.float32(1 / 255))
        frames[t] = np.clip(behind + moved[..., :3], 0, 255).transpose(2, 0, 1)
    return frames


def _check(index, seed, speakers, seconds, fps, sample_rate, size, motion) -> None:
    def whole(value, low: int, high: float = math.inf) -> bool:
        return isinstance(value, (int, np.integer)) and bool(low <= value <= high)

    def within(value, low: float, high: float) -> bool:
        return isinstance(value, (int, float, np.number)) and bool(low <= value <= high)

    frame = 1.0 / fps if within(fps, 5, 240) else 0.0
    pair = isinstance(size, (tuple, list)) and len(size) == 2
    for name, value, good, expected in (
        ("index", index, whole(index, 0), "an integer of at least 0"),
        ("seed", seed, whole(seed, 0), "an integer of at least 0"),
        ("speakers", speakers, whole(speakers, 1), "an integer of at least 1"),
        ("fps", fps, within(fps, 5, 240), "a number in 5..240"),
        ("seconds", seconds, within(seconds, frame, 600), "at least a frame, at most 600 s"),
        (
            "sample_rate",
            sample_rate,
            whole(sample_rate, 8000, 192_000),
            "an integer in 8000..192000",
        ),
        (
            "size",
            size,
            pair and all(whole(side, 16, 1024) for side in size),
            "(height, width) with integers in 16..1024",
        ),
        ("motion", motion, within(motion, 0, 3), "a number in 0..3"),
    ):
        if not good:
            raise ValueError(f"render_clip: {name} is {value!r}, expected {expected}")


def render_clip(
    index: int,
    *,
    seed: int = 0,
    speakers: int = 40,
    seconds: float = 3.0,
    fps: float = 25.0,
    sample_rate: int = 16000,
    size: tuple[int, int] = (128, 96),
    motion: float = 1.0,
) -> Clip:
    """Render clip ``index`` of the set ``seed``; its speaker is number index % speakers.

    The identity depends on (seed, speaker); words, blinks and motion on (seed, index). The same
    arguments give the same bytes. Frame i shows the time (i + 0.5) / fps, the middle of the audio
    that belongs to it. ``size`` is (height, width); the picture is designed at 128 x 96. ``motion``
    scales the movement of the head; 0 holds it still, as an alignment of every frame does.

    ``Clip.truth`` (float32; T frames; pixels are those of the 128 x 96 design):
        openness (T,) inner mouth height in pixels = OPENING * articulation[0] * jaw_drive
        width (T,) mouth corner to corner in pixels;  jaw_drive (T,), spread_drive (T,) what the
        audio alone says, before articulation;  articulation (8,) see ``Identity.articulation``
        blink_times (K, 2) start and end in s;  eye_openness (T,) 0..1;  formants (T, 4) Hz
        lips (T, 3) opening, and height and width less their means, over the distance of the eyes
        voiced (T,) 0..1;  pose (T, 3) shift right, down in pixels, roll in degrees

    Raises ValueError if an argument is out of range.
    """
    _check(index, seed, speakers, seconds, fps, sample_rate, size, motion)
    number = int(index) % int(speakers)
    who = speaker_identity(number, seed=int(seed))
    speech_rng, blink_rng, pose_rng, gaze_rng = (
        np.random.default_rng([int(seed), 1, int(index), part]) for part in range(4)
    )
    count = int(seconds * fps + 1e-6)
    times = (np.arange(count) + 0.5) / fps
    said = speak(speech_rng, who.voice, seconds=seconds, sample_rate=sample_rate, times=times)
    mouth = articulate(who, said)
    blinks = draw_blinks(blink_rng, seconds)
    eyes = eyelids(blinks, times, fps)
    pose = np.stack([_wander(pose_rng, times, 0.9) for _ in range(3)], axis=1)
    pose *= np.multiply(motion, (1.6, 1.1, 1.5))
    frames = _render(
        who, mouth, eyes, _gaze(gaze_rng, count, fps), pose * (1, 1, np.pi / 180), size
    )
    truth = {
        "openness": mouth.openness,
        "width": mouth.width,
        "jaw_drive": said.jaw,
        "spread_drive": said.spread,
        "articulation": who.articulation,
        "blink_times": blinks,
        "eye_openness": eyes,
        "lips": _lip_shape(mouth),
        "formants": said.formants,
        "voiced": said.voiced,
        "pose": pose.astype(np.float32),
    }
    return Clip(
        frames=frames,
        audio=said.audio,
        fps=float(fps),
        sample_rate=int(sample_rate),
        speaker=f"speaker{number:02d}",
        name=f"{index:04d}",
        truth={key: np.ascontiguousarray(value, np.float32) for key, value in truth.items()},
    )
