"""Mel-frequency cepstral coefficients as SyncNet's published weights expect them.

The defaults of ``python_speech_features`` 0.6: pre-emphasis 0.97, rectangular frames of 25 ms every
10 ms, 512-point power spectrum, 26 triangular mel filters, 13 cepstra lifted by 22, the first one
replaced by the logarithm of the frame's energy.
"""

from __future__ import annotations

import math

import numpy as np

from model.mfcc import PREEMPHASIS, lifted_dct, mel_filters

FRAME_SECONDS, STEP_SECONDS = 0.025, 0.010
FFT = 512
FILTERS = 26
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
    filters = mel_filters(sample_rate, FFT, FILTERS, 0.0, sample_rate / 2, to_bins=True).numpy()
    bands = np.maximum(power @ filters.T, _EPS)
    cepstra = np.log(bands) @ lifted_dct(FILTERS).numpy().T
    cepstra[:, 0] = np.log(energy)
    return cepstra
