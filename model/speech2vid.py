"""Speech2Vid, the baseline of Chung, Jamaludin and Zisserman, "You said that?", BMVC 2017.

Layer sizes follow third-party readings of the published network, which nobody has described
completely. What is adapted here:

- frames have ``ModelConfig``'s size instead of 112×112 (published output: 109×109); maps that do
  not halve evenly are rounded up, and the decoder returns to the encoder's sizes;
- the widths scale with ``base_channels``; 64 gives the published ones;
- the identity encoder sees one still. The published one sees five, and with one still fed five
  times its first convolution is the one here, the five sets of weights summed;
- it starts from random weights instead of VGG-Face's.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.mfcc import SpeechWindows
from model.talking_face import check_inputs
from polyfusion.nn import NormActivation

BOTTOM_STRIDE = 16


class Speech2Vid(nn.Module):
    """Still and speech in, talking face out: im + R(im), with the interface of ``TalkingFace``.

    ``generator`` makes im, ``deblur`` adds the residual R(im), which is 0 until it is trained.

    Args:
        config: frame size, rates and ``base_channels``; nothing else of it is used.
        kernels: "auto", "eager", "triton" or "cuda", for the batch normalisations.
    """

    def __init__(self, config: ModelConfig, kernels: str = "auto"):
        super().__init__()
        self.config = config
        self.generator = BlurryGenerator(config, kernels)
        self.deblur = DeblurNet(config)
        self._generator_frozen = False

    def freeze_generator(self, frozen: bool = True) -> None:
        """Keep the generator's batch-norm statistics, as the training of ``deblur`` needs it."""
        self._generator_frozen = frozen
        self.generator.train(self.training and not frozen)

    def train(self, mode: bool = True) -> "Speech2Vid":
        super().train(mode)
        self.generator.train(mode and not self._generator_frozen)
        return self

    @property
    def context(self) -> int:
        """Frames of sound beyond a clip's ends that it can make use of."""
        return self.generator.speech.windows.context

    def forward(
        self,
        still: Tensor,
        audio: Tensor,
        rng: torch.Generator | None = None,
        *,
        context: int = 0,
    ) -> Tensor:
        """Animate stills.

        Args:
            still: (B, 3, H, W) in [−1, 1].
            audio: (B, N) in [−1, 1] at ``config.sample_rate``.
            rng: not used, nothing here is random.
            context: frames of ``audio`` at both ends that are heard and not shown.

        Returns:
            Frames (B, T, 3, H, W) in [−1, 1], T = floor(N / config.samples_per_frame) − 2 context.
        """
        return self.deblur(self.generator(still, audio, context)).clamp(-1, 1)


class BlurryGenerator(nn.Module):
    """Still (B, 3, H, W) and audio (B, N) → frames (B, T, 3, H, W) in (−1, 1), before deblurring.

    A layer that joins something per clip with something per frame is two layers whose outputs are
    added, so that what is constant over the clip is computed once.
    """

    def __init__(self, config: ModelConfig, kernels: str = "auto"):
        super().__init__()
        self.config = config
        w = widths(config, 64, 96, 256, 512)
        self.size = tuple(-(-n // BOTTOM_STRIDE) for n in (config.height, config.width))
        area = self.size[0] * self.size[1]
        self.speech = SpeechEncoder(config, w[2], kernels)
        self.identity = StillEncoder(config, w[2], kernels)
        self.mix_speech = nn.Linear(w[2], 2 * area)
        self.mix_identity = nn.Linear(w[2], 2 * area, bias=False)
        self.first = nn.Sequential(
            nn.ZeroPad2d((2, 3, 2, 3)),
            nn.Conv2d(2, w[3], 6, bias=False),
            NormActivation(w[3], kernels=kernels),
            conv_block(w[3], w[2], 5, 1, kernels),
        )
        self.ups = nn.ModuleList(
            [
                UpBlock(w[2], w[2], w[1], kernels),
                UpBlock(w[1], w[2], w[1], kernels),
                UpBlock(w[1], w[1], w[0], kernels),
            ]
        )
        self.final = nn.ConvTranspose2d(w[0], 3, 5, 2, 2)

    def forward(self, still: Tensor, audio: Tensor, context: int = 0) -> Tensor:
        check_inputs(self.config, still, audio)
        speech = self.speech(audio, context)  # (B, T, 256)
        identity, (pool1, conv2, pool2) = self.identity(still)
        x = self.mix_speech(speech) + self.mix_identity(identity).unsqueeze(1)
        x = self.first(x.relu().flatten(0, 1).unflatten(1, (2, *self.size)))
        half = [-(-n // 2) for n in still.shape[2:]]
        sizes = [conv2.shape[2:], pool1.shape[2:], half]
        for up, skip, size in zip(self.ups, (pool2, conv2, pool1), sizes, strict=True):
            x = up(x, skip, list(size))
        x = self.final(x, output_size=list(still.shape[2:]))
        return torch.tanh(x).unflatten(0, speech.shape[:2])  # = 2·sigmoid − 1 of twice the weights


class SpeechEncoder(nn.Module):
    """Audio (B, N) → (B, T, out_dim): convolutions over the 12×35 cepstra of every frame."""

    def __init__(self, config: ModelConfig, out_dim: int, kernels: str = "auto"):
        super().__init__()
        self.windows = SpeechWindows(config.sample_rate, config.samples_per_frame)
        w = widths(config, 64, 128, 256, 256, 512)
        blocks = [conv_block(i, o, 3, 1, kernels) for i, o in zip([1, *w], w, strict=False)]
        self.convs = nn.Sequential(
            *blocks[:2], nn.MaxPool2d(3, (1, 2), 1), *blocks[2:], nn.MaxPool2d(3, 2, 1)
        )
        self.head = _two_linear(w[-1] * 6 * 9, w[-1], out_dim)

    def forward(self, audio: Tensor, context: int = 0) -> Tensor:
        windows = self.windows(audio, context)  # (B, T, 12, 35)
        x = self.convs(windows.flatten(0, 1).unsqueeze(1))
        return self.head(x.flatten(1)).unflatten(0, windows.shape[:2])


class StillEncoder(nn.Module):
    """Still (B, 3, H, W) → (B, out_dim) and the decoder's skips, finest first: pool1 (1/4 of the
    resolution), conv2 (1/8), pool2 (1/16)."""

    def __init__(self, config: ModelConfig, out_dim: int, kernels: str = "auto"):
        super().__init__()
        w = widths(config, 96, 256, 512)
        self.conv1 = conv_block(3, w[0], 7, 2, kernels)
        self.conv2 = conv_block(w[0], w[1], 5, 2, kernels)
        self.conv3 = nn.Sequential(
            *(conv_block(i, w[2], 3, 1, kernels) for i in (w[1], w[2], w[2]))
        )
        area = -(-config.height // BOTTOM_STRIDE) * -(-config.width // BOTTOM_STRIDE)
        self.head = _two_linear(w[2] * area, w[2], out_dim)

    def forward(self, still: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        pool1 = F.max_pool2d(self.conv1(still), 3, 2, 1)
        conv2 = self.conv2(pool1)
        pool2 = F.max_pool2d(conv2, 3, 2, 1)
        return self.head(self.conv3(pool2).flatten(1)), (pool1, conv2, pool2)


class UpBlock(nn.Module):
    """5×5 transposed convolution, stride 2, of a frame map and a clip's skip; norm and ReLU."""

    def __init__(self, channels: int, skip_channels: int, out: int, kernels: str = "auto"):
        super().__init__()
        self.frames = nn.ConvTranspose2d(channels, out, 5, 2, 2, bias=False)
        self.skip = nn.ConvTranspose2d(skip_channels, out, 5, 2, 2, bias=False)
        self.norm = NormActivation(out, kernels=kernels)

    def forward(self, x: Tensor, skip: Tensor, size: list[int]) -> Tensor:
        """x (B·T, C, h, w), skip (B, C_s, h, w) → (B·T, out, *size), size 2h or 2h − 1."""
        return self.norm(self.frames(x, output_size=size), self.skip(skip, output_size=size))


class DeblurNet(nn.Module):
    """im (B, T, 3, H, W) → im + R(im): ten 3×3 convolutions. R is 0 at the start."""

    def __init__(self, config: ModelConfig, layers: int = 10):
        super().__init__()
        width = config.base_channels
        sizes = [3, *[width] * (layers - 1), 3]
        convs = [nn.Conv2d(i, o, 3, padding=1) for i, o in itertools.pairwise(sizes)]
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        nn.init.zeros_(convs[-1].weight)
        self.convs = nn.ModuleList(convs)

    def forward(self, image: Tensor) -> Tensor:
        x = image.flatten(0, 1)
        for conv in self.convs[:-1]:
            x = conv(x).relu_()
        return image + self.convs[-1](x).view_as(image)


def widths(config: ModelConfig, *published: int) -> list[int]:
    """Channels at the configured scale."""
    return [max(1, c * config.base_channels // 64) for c in published]


def conv_block(i: int, o: int, size: int, stride: int, kernels: str) -> nn.Sequential:
    """Convolution that keeps the size, or halves it and rounds up; batch norm and ReLU."""
    conv = nn.Conv2d(i, o, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, NormActivation(o, kernels=kernels))


def _two_linear(i: int, hidden: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(i, hidden), nn.ReLU(), nn.Linear(hidden, o), nn.ReLU())
