"""The published system once more: plain modules under the published names, and its files."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from model.published import STATES


@dataclass(frozen=True)
class Sizes:
    height: int = 32
    width: int = 24
    depth: int = 3
    base: int = 4
    speech: int = 16
    identity: int = 8
    noise: int = 3


SMALL, PUBLISHED = Sizes(), Sizes(128, 96, 5, 64, 256, 128, 10)
GRID, CREMA, TIMIT = (40_000, 25), (16_000, 30), (48_000, 30)


class Speech(nn.Module):
    def __init__(self, z: Sizes, rate: int):
        super().__init__()
        widths = [z.speech >> i for i in (4, 3, 2, 1, 0)]
        layers = [(rate // 200, rate // 1000, rate // 500), *[(4, 2, 1)] * 3, (10, 5, 3)]
        pairs = zip([1, *widths], widths, layers, strict=False)
        self.encoder = nn.Module()
        self.encoder.cl = nn.ModuleList(
            [*(nn.Conv1d(i, o, *layer) for i, o, layer in pairs), nn.Conv1d(z.speech, z.speech, 5)]
        )
        self.encoder.activations = nn.ModuleList(
            [*(nn.Sequential(nn.BatchNorm1d(o), nn.ReLU()) for o in widths), nn.Tanh()]
        )
        self.rnn = nn.GRU(z.speech, z.speech, 2, batch_first=True)

    def forward(self, windows):
        x = windows.unsqueeze(1)
        for conv, activation in zip(self.encoder.cl, self.encoder.activations, strict=True):
            x = activation(conv(x))
        return self.rnn(x.squeeze(2).unsqueeze(0))[0][0]  # (T, a)


class Identity(nn.Module):
    def __init__(self, z: Sizes):
        super().__init__()
        widths = [3, *(z.base << i for i in range(z.depth))]
        self.cl = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 4, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in itertools.pairwise(widths)
        )
        bottom = (z.height >> z.depth, z.width >> z.depth)
        last = nn.Conv2d(widths[-1], z.identity, bottom, bias=False)
        self.cl.append(nn.Sequential(last, nn.Tanh()))

    def forward(self, still):
        maps = [still]
        for layer in self.cl:
            maps.append(layer(maps[-1]))
        return maps[-1].flatten(1), maps[1:-1]


class Stage(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.dcl1 = nn.ConvTranspose2d(2 * c, c, 3, padding=1, bias=False)
        self.dcl2 = nn.ConvTranspose2d(c, c // 2, 4, 2, 1, bias=False)
        self.activation1 = nn.Sequential(nn.BatchNorm2d(c), nn.ReLU())
        self.activation2 = nn.Sequential(nn.BatchNorm2d(c // 2), nn.ReLU())

    def forward(self, x, skip):
        x = self.activation1(self.dcl1(torch.cat([x, skip], 1)))
        return self.activation2(self.dcl2(x))


class Drawing(nn.Module):
    def __init__(self, z: Sizes):
        super().__init__()
        self.rnn_noise = nn.GRU(z.noise, z.noise, batch_first=True)
        top = z.base << (z.depth - 1)
        size, bottom = z.speech + z.noise + z.identity, (z.height >> z.depth, z.width >> z.depth)
        first = nn.ConvTranspose2d(size, top, bottom, bias=False)
        self.dcl = nn.ModuleList(
            [
                nn.Sequential(first, nn.BatchNorm2d(top), nn.ReLU()),
                *(Stage(top >> i) for i in range(z.depth - 1)),
                nn.ConvTranspose2d(z.base, 3, 4, 2, 1, bias=False),
            ]
        )

    def forward(self, speech, identity, noise, skips):
        noise = self.rnn_noise(noise)[0][0].tanh()
        count = len(speech)
        x = torch.cat([speech, noise, identity.repeat(count, 1)], 1)[:, :, None, None]
        x = self.dcl[0](x)
        for stage, skip in zip(self.dcl[1:-1], skips[:0:-1], strict=True):
            x = stage(x, skip.repeat(count, 1, 1, 1))
        return self.dcl[-1](x).tanh()


class System(nn.Module):
    """The published system: still (1, 3, H, W), sound (N,), noise (1, T, n) → (T, 3, H, W)."""

    def __init__(self, z: Sizes, rates: tuple[int, int]):
        super().__init__()
        self.z, (self.rate, self.fps) = z, rates
        self.stride = self.rate // self.fps
        self.encoder, self.encoder_id = Speech(z, self.rate), Identity(z)
        self.generator = Drawing(z)

    def forward(self, still, sound, noise):
        padding = self.rate // 5 - self.stride
        left = sound.new_zeros(padding // 2)
        right = sound.new_zeros(padding - padding // 2)
        padded = torch.cat([left, sound, right])
        count = (len(padded) - self.rate // 5) // self.stride + 1
        starts = range(0, count * self.stride, self.stride)
        windows = torch.stack([padded[i : i + self.rate // 5] for i in starts])
        identity, skips = self.encoder_id(still)
        return self.generator(self.encoder(windows), identity, noise, skips)

    def inputs(self, frames: int = 7):
        """A still, sound that ends just before a whole frame, and the noise of seed 1."""
        rng = torch.Generator().manual_seed(0)
        still = torch.rand(1, 3, self.z.height, self.z.width, generator=rng) * 2 - 1
        sound = torch.rand(frames * self.stride + self.stride - 1, generator=rng) * 2 - 1
        rng = torch.Generator().manual_seed(1)
        return still, sound, 0.33 * torch.randn(1, frames, self.z.noise, generator=rng)

    def checkpoint(self) -> dict:
        face = np.random.default_rng(0).uniform(6, 18, (68, 2))
        return {name: getattr(self, name).state_dict() for name in STATES} | {
            "mean_face": face,
            "img_size": (self.z.height, self.z.width),
            "audio_rate": self.rate,
            "video_rate": self.fps,
            "audio_feat_len": 0.2,
            "audio_feat_samples": self.rate // 5,
            "id_enc_dim": self.z.identity,
            "rnn_gen_dim": self.z.speech,
            "aud_enc_dim": self.z.speech,
            "aux_latent": self.z.noise,
            "sequential_noise": True,
        }


def system(z: Sizes = SMALL, rates: tuple[int, int] = CREMA) -> System:
    """Random weights; the normalisations' statistics are those of the inputs, so that no layer
    fades or saturates."""
    torch.manual_seed(2)
    made = System(z, rates)
    norms = [m for m in made.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.normal_(norm.weight, 0.7, 0.1)
        nn.init.normal_(norm.bias, 0.0, 0.2)
    with torch.no_grad():
        made(*made.inputs())
    return made.eval().requires_grad_(False)


def save(path, whole, **options):
    """In the format of the published files, from before torch.save wrote archives."""
    torch.save(whole, path, _use_new_zipfile_serialization=False, **options)
    return path
