"""Sound is read in pieces, and the pieces are the whole."""

import av
import numpy as np
import pytest

from train.data.limits import MediaError
from train.data.recording import Recording, Wave

RATE = 16000


def tone(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """(channels, N) float32, a tone of 400 Hz that grows louder, the same in every channel."""
    time = np.arange(round(seconds * rate)) / rate
    wave = (0.5 * time / max(seconds, 1e-9) * np.sin(2 * np.pi * 400 * time)).astype(np.float32)
    return np.repeat(wave[None], channels, axis=0)


def write_sound(path, wave, rate, codec, layout="mono", form="fltp", skip=()) -> None:
    """Write sound (channels, N); packets numbered in ``skip`` are left out."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        resample = av.AudioResampler(stream.format.name, layout, rate)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave), format=form, layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        packets = [p for f in [*resample.resample(frame), None] for p in stream.encode(f)]
        container.mux([p for number, p in enumerate(packets) if number not in skip])


#: name: rate, codec, layout
SOUNDS = {
    "phone µ-law.wav": (8000, "pcm_mulaw", "mono"),
    "studio.wav": (96000, "pcm_s24le", "stereo"),
    "cinema.flac": (48000, "flac", "5.1"),
    "speech.m4a": (44100, "aac", "stereo"),
    "речь 1.ogg": (48000, "libopus", "mono"),
    "song.mp3": (44100, "libmp3lame", "stereo"),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_pieces_are_the_sound_of_every_kind(tmp_path, name):
    rate, codec, layout = SOUNDS[name]
    channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    write_sound(tmp_path / name, tone(2.5, rate, channels), rate, codec, layout)
    recording = Recording(tmp_path / name)
    assert recording.seconds == pytest.approx(2.5, abs=0.08)
    pieces = [*recording.pieces(RATE)]
    assert max(map(len, pieces)) <= 1.5 * RATE
    wave, expected = np.concatenate(pieces), tone(2.5, RATE)[0]
    assert len(wave) == pytest.approx(len(expected), abs=0.08 * RATE)
    fit = max(
        float(np.corrcoef(wave[shift : shift + 30000], expected[:30000])[0, 1])
        for shift in range(0, 1600, 4)  # the encoders' delay
    )
    assert fit > 0.97
    assert np.abs(wave).max() == pytest.approx(0.5, rel=0.15)


def test_a_wave_is_a_recording_too():
    wave = tone(2.2, 44100)[0]
    ints = (wave * 32767).round().astype(np.int16)
    pieces = [np.concatenate([*Wave(w, 44100).pieces(RATE)]) for w in (wave, ints)]
    assert len(pieces[0]) == pytest.approx(2.2 * RATE, abs=2)
    np.testing.assert_allclose(pieces[0], pieces[1], atol=1e-3)
    assert Wave(np.zeros(100), RATE).remarks == ("silent: nothing is louder than -60 dB",)
    with pytest.raises(MediaError, match="sample_rate 0: expected"):
        Wave(wave, 0)
    for odd in (np.zeros((2, 2, 2)), np.array(["a"]), np.full(10, np.nan)):
        with pytest.raises(MediaError, match="sound: "):
            Wave(odd, RATE)


def test_holes_are_silent_and_what_is_odd_is_said(tmp_path):
    path = tmp_path / "hole.mkv"
    write_sound(path, tone(4.0, 48000), 48000, "libopus", skip=range(50, 75))
    recording = Recording(path)
    assert "hole in the sound: 0.50 s" in "; ".join(recording.remarks)
    wave = np.concatenate([*recording.pieces(RATE)])
    assert len(wave) == pytest.approx(4.0 * RATE, abs=0.08 * RATE)
    assert np.abs(wave[round(1.1 * RATE) : round(1.4 * RATE)]).max() < 1e-4
    assert np.abs(wave[round(1.6 * RATE) :]).max() > 0.1

    write_sound(tmp_path / "silence.wav", np.zeros((1, 8000)), 8000, "pcm_s16le", form="dblp")
    assert "silent" in Recording(tmp_path / "silence.wav").remarks[0]

    odd = tone(1.0, 16000)
    odd[0, 5000:5003] = np.nan, np.inf, -np.inf
    write_sound(tmp_path / "floats.wav", odd, 16000, "pcm_f32le")
    floats = np.concatenate([*Recording(tmp_path / "floats.wav").pieces(RATE)])
    assert np.isfinite(floats).all()
    assert np.abs(floats[8000:]).max() == pytest.approx(0.5, rel=0.05)

    write_sound(tmp_path / "half.flac", tone(4.0, 48000), 48000, "flac")
    data = (tmp_path / "half.flac").read_bytes()
    (tmp_path / "half.flac").write_bytes(data[: len(data) // 2])
    half = Recording(tmp_path / "half.flac")
    assert any(remark.startswith("cut short") for remark in half.remarks)
    assert 0 < half.seconds < 3.5
