"""Mel-frequency cepstral coefficients as SyncNet's published weights expect them.

The defaults of `python_speech_features` 0.6: pre-emphasis 0.97, rectangular frames of 25 ms every
10 ms, 512-point power spectrum, 26 triangular mel filters, 13 cepstra lifted by 22, the first one
replaced by the logarithm of the frame's energy.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.fft import dct

FRAME_SECONDS, STEP_SECONDS = 0.025, 0.010
FFT = 512
FILTERS, CEPSTRA, LIFTER = 26, 13, 22
PREEMPHASIS = 0.97
_EPS = float(np.finfo(float).eps)


def mfcc(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """(M, 13) float64 of a mono signal (N,), N > 0, in the scale of 16-bit integers.

    M = 1 + ceil((N - frame) / step), and at least 1: the last frame is filled with zeros. The scale
    only shifts the first coefficient. Sample rates up to 20 480 Hz, so that a frame fits the FFT.
    """
    frame, step = round(FRAME_SECONDS * sample_rate), round(STEP_SECONDS * sample_rate)
    signal = np.asarray(audio, np.float64)
    signal = np.append(signal[0], signal[1:] - PREEMPHASIS * signal[:-1])
    count = 1 + max(0, math.ceil((len(signal) - frame) / step))
    signal = np.pad(signal, (0, max(0, (count - 1) * step + frame - len(signal))))
    frames = np.lib.stride_tricks.sliding_window_view(signal, frame)[::step][:count]
    power = np.abs(np.fft.rfft(frames, FFT)) ** 2 / FFT
    energy = np.maximum(power.sum(1), _EPS)
    bands = np.maximum(power @ mel_filters(sample_rate).T, _EPS)
    cepstra = dct(np.log(bands), type=2, norm="ortho", axis=1)[:, :CEPSTRA]
    cepstra *= 1 + LIFTER / 2 * np.sin(np.pi * np.arange(CEPSTRA) / LIFTER)
    cepstra[:, 0] = np.log(energy)
    return cepstra


def mel_filters(sample_rate: int) -> np.ndarray:
    """(26, 257) triangles whose corners are equidistant in mel and rounded down to FFT bins."""
    top = 2595 * np.log10(1 + sample_rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, FILTERS + 2) / 2595) - 1)
    bins = np.floor((FFT + 1) * corners / sample_rate)
    low, centre, high = (b[:, None] for b in (bins[:-2], bins[1:-1], bins[2:]))
    k = np.arange(FFT // 2 + 1)
    with np.errstate(divide="ignore", invalid="ignore"):  # a side may have no width
        rising, falling = (k - low) / (centre - low), (high - k) / (high - centre)
    return np.where((low <= k) & (k < centre), rising, 0) + np.where(
        (centre <= k) & (k < high), falling, 0
    )
