"""The shape of the lips, foretold by the sound.

An L1 against the real frames draws the mouth that is right on average: where the sound leaves open
how far the lips part, that is a mouth that hardly moves. With the measured shape of the lips as an
input the same L1 teaches what such lips look like on this face, at their full amplitude, and a
small network of its own learns what the sound foretells of the shape.
"""

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.mel import MelAudioEncoder

#: Opening, height and width of the lips, in distances of the eyes.
SHAPE = 3
#: The usual standard deviation of each of them over a clip of speech.
SPREAD = 0.06
#: The mean opening over speech; height and width are less their means already.
MEAN = (0.088, 0.0, 0.0)


class LipsEncoder(nn.Module):
    """Waveform (B, N) in [−1, 1] → shape of the lips (B, T, 3) in distances of the eyes.

    Opening, and height and width less the speaker's means. Hears as far as
    :class:`model.mel.MelAudioEncoder`, whose layers it has.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.audio = MelAudioEncoder(config)
        self.head = nn.Linear(config.audio_dim, SHAPE)

    def forward(self, audio: Tensor, context: int = 0) -> Tensor:
        """``context`` frames of sound at both ends are heard and get no shape."""
        return SPREAD * self.head(self.audio(audio, context))


def exaggerate(lips: Tensor, gain: float) -> Tensor:
    """Shapes of the lips (B, T, 3) that depart from the mean ``gain`` times as far."""
    mean = torch.cat([lips.new_full((1,), value) for value in MEAN])  # made where it is needed
    return mean + gain * (lips - mean)
