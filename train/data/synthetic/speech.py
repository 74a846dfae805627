"""Synthetic speech: a glottal source through moving formants, and the lip gestures that go with it.

An utterance is a string of phones (consonant + vowel syllables in phrases, pauses between them).
Every phone sets targets for the control tracks below; Gaussian smoothing of the tracks is the
coarticulation. The audio and the mouth are both read from the same tracks, so the mouth is a
function of the formants: jaw opening follows F1, spreading and rounding follow F2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d

CONTROL_RATE = 500.0  # Hz, rate of the control tracks
NEUTRAL = (500.0, 1500.0, 2500.0, 3500.0)  # formants of a uniform tube, held in pauses
BANDWIDTHS = (70.0, 90.0, 140.0, 220.0)  # Hz, of F1..F4
SPEECH_RMS = 0.1  # where there is sound
PEAK = 0.9

# F1..F4 in Hz of adult male vowels, after the averages of Peterson and Barney (1952).
VOWELS = {
    "i": (270, 2290, 3010, 3550),
    "I": (390, 1990, 2550, 3500),
    "E": (530, 1840, 2480, 3500),
    "ae": (660, 1720, 2410, 3450),
    "A": (730, 1090, 2440, 3400),
    "O": (570, 840, 2410, 3300),
    "U": (440, 1020, 2240, 3300),
    "u": (300, 870, 2240, 3300),
    "V": (640, 1190, 2390, 3400),
    "er": (490, 1350, 1690, 3300),
}


@dataclass(frozen=True)
class Consonant:
    """Targets of a consonant; ``burst`` marks a stop, whose release is a 15 ms noise burst."""

    formants: tuple[float, float, float, float]
    duration: tuple[float, float]  # s, range
    voice: float = 0.0  # level of the voiced source, vowels are 1
    noise: float = 0.0  # RMS of the frication, vowels are about 1
    band: tuple[float, float] = (3000.0, 1500.0)  # Hz, centre and width of the noise
    lips: float = 0.0  # lip closure in 0..1
    gate: float = 0.35  # how far the jaw may follow F1
    burst: bool = False


CONSONANTS = {
    "p": Consonant(
        (250, 900, 2300, 3400), (0.06, 0.09), band=(900, 900), lips=1, gate=0, burst=True
    ),
    "b": Consonant(
        (220, 900, 2300, 3400), (0.06, 0.09), 0.12, band=(700, 700), lips=1, gate=0, burst=True
    ),
    "m": Consonant((250, 1050, 2200, 3300), (0.06, 0.1), 0.4, lips=1, gate=0),
    "t": Consonant((320, 1750, 2650, 3500), (0.05, 0.08), band=(4200, 1800), burst=True),
    "k": Consonant((320, 1900, 2300, 3400), (0.05, 0.08), band=(2100, 800), burst=True),
    "d": Consonant((280, 1750, 2650, 3500), (0.05, 0.08), 0.12, band=(3800, 1700), burst=True),
    "n": Consonant((280, 1650, 2500, 3400), (0.05, 0.08), 0.4),
    "s": Consonant((330, 1750, 2600, 3500), (0.08, 0.12), noise=0.32, band=(5600, 1100), gate=0.25),
    "S": Consonant((330, 1700, 2400, 3400), (0.08, 0.12), noise=0.32, band=(3000, 800), gate=0.3),
    "f": Consonant(
        (330, 1100, 2300, 3400), (0.07, 0.11), noise=0.10, band=(4000, 3000), lips=0.7, gate=0.2
    ),
    "z": Consonant((300, 1700, 2600, 3500), (0.07, 0.1), 0.3, 0.16, (5400, 1200), gate=0.25),
    "w": Consonant((300, 680, 2200, 3300), (0.05, 0.08), 0.6, gate=0.5),
    "j": Consonant((280, 2200, 2900, 3500), (0.05, 0.08), 0.6, gate=0.6),
    "l": Consonant((360, 1150, 2700, 3400), (0.05, 0.08), 0.6, gate=0.8),
    "r": Consonant((350, 1200, 1650, 3300), (0.05, 0.08), 0.6, gate=0.6),
    "h": Consonant(NEUTRAL, (0.05, 0.08), noise=0.08, band=(1500, 1200), gate=0.9),
}


@dataclass(frozen=True)
class Voice:
    """A speaker's voice: mean pitch in Hz, formant scale (1 is an adult man), breathiness 0..1."""

    pitch: float
    tract: float
    breath: float
    tempo: float  # scales all durations; 1 is average, larger is slower


@dataclass(frozen=True)
class Utterance:
    """Audio with its control tracks, sampled at T times chosen by the caller."""

    audio: np.ndarray  # (N,) float32
    formants: np.ndarray  # (T, 4) float32, Hz, as voiced by this speaker
    voiced: np.ndarray  # (T,) float32, level of the voiced source, 0..1
    jaw: np.ndarray  # (T,) float32, 0..1: audio-driven opening, before any articulation
    spread: np.ndarray  # (T,) float32, -1 (rounded) .. 1 (spread)


@dataclass(frozen=True)
class _Segment:
    start: float
    end: float
    formants: tuple[float, ...]
    voice: float
    noise: float
    band: tuple[float, float]
    lips: float
    gate: float
    pitch: float  # log ratio to the speaker's mean


def _score(rng: np.random.Generator, seconds: float, tempo: float) -> list[_Segment]:
    """Draw the phones of an utterance: phrases of 3 to 8 syllables of 120 to 280 ms, and pauses."""
    segments: list[_Segment] = []
    clock = 0.0

    def add(
        duration,
        formants,
        *,
        voice=0.0,
        noise=0.0,
        band=(3000, 1500),
        lips=0.0,
        gate=0.0,
        pitch=0.0,
    ):
        nonlocal clock
        end = clock + duration
        segments.append(_Segment(clock, end, formants, voice, noise, band, lips, gate, pitch))
        clock = end

    vowels, consonants = list(VOWELS.values()), list(CONSONANTS.values())
    lead = rng.uniform(0.1, 0.3) if rng.random() < 0.85 else rng.uniform(0.0, 0.06)
    add(lead, NEUTRAL)
    while clock < seconds:
        syllables = int(rng.integers(3, 9))
        for i in range(syllables):
            accent = rng.uniform(-1, 1)
            pitch = 0.12 - 0.28 * i / syllables + 0.09 * accent
            c = consonants[rng.integers(len(consonants))]
            onset = tempo * rng.uniform(*c.duration)
            add(
                onset,
                c.formants,
                voice=c.voice,
                noise=c.noise,
                band=c.band,
                lips=c.lips,
                gate=c.gate,
                pitch=pitch,
            )
            if c.burst:
                add(
                    0.015, c.formants, voice=c.voice, noise=0.35, band=c.band, gate=0.3, pitch=pitch
                )
            length = min(
                tempo * rng.uniform(0.09, 0.17) * (1.3 if i == syllables - 1 else 1), 0.265 - onset
            )
            level = 0.9 + 0.15 * accent
            add(length, vowels[rng.integers(len(vowels))], voice=level, gate=1.0, pitch=pitch)
        add(tempo * rng.uniform(0.15, 0.45), NEUTRAL)
    return segments


def _tracks(segments: list[_Segment], seconds: float) -> dict[str, np.ndarray]:
    """Smoothed control tracks on the grid k / CONTROL_RATE, (K,) or (K, n) each."""
    grid = np.arange(int(np.ceil(seconds * CONTROL_RATE)) + 2) / CONTROL_RATE
    which = np.searchsorted([s.start for s in segments], grid, side="right") - 1

    def track(values, ms):
        steps = np.asarray(values, np.float64)[which]
        return gaussian_filter1d(steps, ms * 1e-3 * CONTROL_RATE, axis=0, mode="nearest")

    closed = np.zeros(len(grid))
    for s in segments:  # the lips meet a little before and part a little after the closure is heard
        reach = (grid > s.start - 0.012) & (grid < s.end + 0.012)
        closed[reach] = np.maximum(closed[reach], s.lips)
    return {
        "grid": grid,
        "formants": track([s.formants for s in segments], 18),
        "voice": track([s.voice for s in segments], 7),
        "noise": track([s.noise for s in segments], 5),
        "band": track([s.band for s in segments], 5),
        "pitch": track([s.pitch for s in segments], 45),
        "gate": track([s.gate for s in segments], 24),
        "lips": gaussian_filter1d(closed, 0.015 * CONTROL_RATE, mode="nearest"),
    }


def _glottal_flow(phase: np.ndarray, rise: float = 0.42, fall: float = 0.18) -> np.ndarray:
    """Rosenberg's trigonometric pulse (1971) rises for ``rise`` of a period, falls for ``fall``."""
    opening = 0.5 * (1 - np.cos(np.pi * phase / rise))
    closing = np.cos(0.5 * np.pi * (phase - rise) / fall)
    return np.where(phase < rise, opening, np.where(phase < rise + fall, closing, 0.0))


def _synthesise(
    tracks: dict[str, np.ndarray],
    voice: Voice,
    rng: np.random.Generator,
    samples: int,
    sample_rate: int,
) -> np.ndarray:
    """Filter the source by the moving formants, frame by frame in the frequency domain."""
    grid, clock = tracks["grid"], np.arange(samples) / sample_rate
    drift = gaussian_filter1d(rng.standard_normal(len(grid)), 0.02 * CONTROL_RATE) * 0.03
    f0 = voice.pitch * np.exp(np.interp(clock, grid, tracks["pitch"] + drift))
    flow = _glottal_flow(np.cumsum(f0 / sample_rate) % 1.0)
    # The derivative includes lip radiation; aspiration noise flows only while the glottis is open.
    pulses = np.diff(flow, prepend=0.0) * sample_rate / 1000.0
    aspiration = rng.standard_normal(samples) * flow * (0.05 + 0.25 * voice.breath)
    source = (pulses + aspiration) * np.interp(clock, grid, tracks["voice"])
    frication = rng.standard_normal(samples) * np.interp(clock, grid, tracks["noise"])

    hop = max(1, round(0.008 * sample_rate))
    width, size = 3 * hop, 6 * hop  # the zero half of each transform holds the filter's ringing
    frames = -(-samples // hop) + 2
    index = np.arange(frames)[:, None] * hop + np.arange(width)
    window = np.sin(np.pi * (np.arange(width) + 0.5) / width) ** 2 / 1.5

    def spectra(x):  # (frames, size / 2 + 1)
        padded = np.pad(x, (2 * hop, frames * hop + width - samples))
        return np.fft.rfft(padded[index] * window, size)

    freq = np.fft.rfftfreq(size, 1.0 / sample_rate)
    centre = (np.arange(frames) - 0.5) * hop / sample_rate
    response = np.ones((frames, len(freq)), complex)
    for i, bandwidth in enumerate(BANDWIDTHS):
        formant = np.interp(centre, grid, tracks["formants"][:, i])[:, None] * voice.tract
        pole = -0.5 * bandwidth + 1j * formant
        response *= np.abs(pole) ** 2 / ((1j * freq - pole) * (1j * freq - pole.conj()))
    band = [np.interp(centre, grid, tracks["band"][:, i])[:, None] for i in (0, 1)]
    hiss = np.exp(-0.5 * ((freq - band[0]) / band[1]) ** 2)

    out = np.zeros(frames * hop + size)
    voiced = np.fft.irfft(spectra(source) * response, size)
    voiced *= 1.0 / max(float(np.sqrt((voiced**2).mean()) * 3.0), 1e-9)
    hissing = np.fft.irfft(spectra(frication) * hiss, size)
    for start in range(0, size, hop):  # overlap-add, one hop-wide column block at a time
        block = (voiced + hissing)[:, start : start + hop]
        out[start : start + frames * hop] += block.reshape(-1)
    return out[2 * hop : 2 * hop + samples]


def speak(
    rng: np.random.Generator, voice: Voice, *, seconds: float, sample_rate: int, times: np.ndarray
) -> Utterance:
    """Utter random syllables for ``seconds`` s and sample the gestures at ``times`` (T,), in s.

    Where there is speech the audio has an RMS of 0.1, less if its peak would exceed 0.9; a faint
    noise floor lies under the whole.
    """
    samples = round(seconds * sample_rate)
    tracks = _tracks(_score(rng, seconds, voice.tempo), seconds)
    audio = _synthesise(tracks, voice, rng, samples, sample_rate)
    spoken = float(np.mean(tracks["voice"] + tracks["noise"] > 0.05))
    audio *= SPEECH_RMS * np.sqrt(spoken) / max(float(np.sqrt((audio**2).mean())), 1e-9)
    audio *= min(1.0, PEAK / max(float(np.abs(audio).max()), 1e-9))
    audio += 2e-4 * rng.standard_normal(samples)

    def sample(track):
        return np.interp(times, tracks["grid"], track).astype(np.float32)

    first, second = tracks["formants"][:, 0], tracks["formants"][:, 1]
    free = np.clip(1.0 - 1.05 * tracks["lips"], 0.0, 1.0)
    opening = np.clip((first - 210.0) / 500.0, 0.0, 1.0) * tracks["gate"] * free
    # Open back vowels have a low F2 without rounding, hence the share of F1.
    spread = np.clip((second - 1500.0) / 750.0 + 0.0012 * (first - 450.0), -1.0, 1.0)
    activity = np.clip(gaussian_filter1d(tracks["gate"] + tracks["lips"], 10.0), 0.0, 1.0)
    return Utterance(
        audio=audio.astype(np.float32),
        formants=np.stack([sample(f * voice.tract) for f in tracks["formants"].T], axis=1),
        voiced=np.clip(sample(tracks["voice"]), 0.0, 1.0),
        jaw=sample(opening),
        spread=sample(spread * activity),
    )
