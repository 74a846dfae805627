"""The peer of the whole system: the same networks as one would write them from the papers.

Plain modules; the identity and every skip map are repeated for each frame and concatenated; the
frames are generated once for the discriminators' update and once more for the generator's. Weights
are copied from our modules, so that both compute the same. Like ours it does not compute the
discriminators' weight gradients in the generator's update, and makes the first video without a
graph.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Discriminators, TalkingFace
from model.convolution import HalvingConv2d
from polyfusion.nn import CMFFusion, NormActivation, merge_skip_weight
from polyfusion.ops import reference
from train.config import TrainConfig
from train.device import Batch
from train.trainer.draws import Choice, choose, send
from train.trainer.gan import take_audio, take_frames


class PlainNorm(nn.BatchNorm2d):
    """Batch normalisation, then a (leaky) ReLU."""

    def __init__(self, norm: NormActivation):
        super().__init__(norm.channels, norm.eps, norm.momentum)
        self.activation = nn.LeakyReLU(norm.slope) if norm.slope else nn.ReLU()
        self.load_state_dict(norm.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x))


class PlainSkipConv(nn.Sequential):
    """3×3 transposed convolution of the concatenation of a frame's map and its skip."""

    def __init__(self, block: nn.Module):
        c, skip = block.weight_x.shape[0], block.weight_skip.shape[1]
        conv = nn.ConvTranspose2d(c + skip, c, 3, 1, 1, bias=False)
        conv.weight.data.copy_(merge_skip_weight(block.weight_x.data, block.weight_skip.data))
        super().__init__(conv, PlainNorm(block.norm))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        frames = x.shape[0] // skip.shape[0]
        return super().forward(torch.cat([x, skip.repeat_interleave(frames, 0)], 1))


class PlainUpConv(nn.Sequential):
    """Transposed convolution, batch normalisation, ReLU."""

    def __init__(self, block: nn.Module):
        i, o, size, _ = block.weight.shape
        conv = nn.ConvTranspose2d(i, o, size, block.stride, block.padding, bias=False)
        conv.weight.data.copy_(block.weight.data)
        super().__init__(conv, PlainNorm(block.norm))


class PlainFirst(nn.Sequential):
    """z as a map of one pixel, transposed convolution, batch normalisation, ReLU."""

    def __init__(self, block: nn.Module):
        i, o, *size = block.weight.shape
        conv = nn.ConvTranspose2d(i, o, tuple(size), bias=False)
        conv.weight.data.copy_(block.weight.data)
        super().__init__(conv, PlainNorm(block.norm))

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z[:, :, None, None])


class PlainFinal(nn.Sequential):
    """Transposed convolution to an image, tanh."""

    def __init__(self, block: nn.Module):
        i, o, *_ = block.weight.shape
        conv = nn.ConvTranspose2d(i, o, 4, 2, 1, bias=False)
        conv.weight.data.copy_(block.weight.data)
        super().__init__(conv, nn.Tanh())


class PlainGenerator(nn.Module):
    """The U-Net on concatenated skips."""

    def __init__(self, generator: nn.Module):
        super().__init__()
        self.first = PlainFirst(generator.first)
        self.skip_convs = nn.ModuleList(map(PlainSkipConv, generator.skip_convs))
        self.up_convs = nn.ModuleList(map(PlainUpConv, generator.up_convs))
        self.final = PlainFinal(generator.final)

    def forward(self, z: Tensor, skips: list[Tensor]) -> Tensor:
        x = self.first(z.flatten(0, 1))
        for skip_conv, up_conv, skip in zip(
            self.skip_convs, self.up_convs, reversed(skips), strict=True
        ):
            x = up_conv(skip_conv(x, skip))
        return self.final(x).unflatten(0, z.shape[:2])


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy of PyTorch's own modules: every fused normalisation is batch normalisation and an
    activation, every halving convolution is ``Conv2d``."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NormActivation):
                setattr(parent, name, PlainNorm(child))
            if isinstance(child, HalvingConv2d):
                child.__class__ = nn.Conv2d
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()
    return module


def published_fusion(layer: nn.Module, views: list[Tensor], noise: Tensor | None) -> Tensor:
    """The published form of a fusion layer of :mod:`polyfusion.nn`."""
    form = type(layer).__name__
    if form == "CPFusion":
        return reference.cp_fusion_published(views, list(layer.factors), layer.out, noise)
    if form == "TuckerFusion":
        factors = list(layer.factors)
        return reference.tucker_fusion_published(views, layer.core, factors, layer.out, noise)
    if isinstance(layer, CMFFusion):
        second = None if layer.second is None else list(layer.second)
        return reference.cmf_fusion_published(
            views, list(layer.first), second, layer.out, layer.bias, noise
        )
    if form == "DenseFusion":
        return reference.dense_fusion_reference(views, layer.weight, noise)
    return torch.cat([*reference.repeat_frames(views), *([] if noise is None else [noise])], -1)


class PlainTalkingFace(nn.Module):
    """Encoders, published fusion, generator on repeated identity."""

    def __init__(self, model: TalkingFace):
        super().__init__()
        self.identity, self.audio, self.noise, self.fusion = (
            plain_copy(part) for part in (model.identity, model.audio, model.noise, model.fusion)
        )
        self.generator = PlainGenerator(model.generator)

    def forward(self, still: Tensor, audio: Tensor, rng: torch.Generator) -> Tensor:
        speech = self.audio(audio)
        identity, skips = self.identity(still)
        noise = self.noise(self.noise.sample(*speech.shape[:2], rng).to(speech.dtype))
        return self.generator(published_fusion(self.fusion, [speech, identity], noise), skips)


class PlainTrainer:
    """The update rule of ``train.trainer.gan``; networks are called where needed."""

    def __init__(self, config: TrainConfig, model: TalkingFace, discriminators: Discriminators):
        self.config = c = config
        self.model = PlainTalkingFace(model)
        self.discriminators = d = plain_copy(discriminators)
        device = next(model.parameters()).device
        self.to(device)
        self.rates = (
            (self.model, c.lr_generator),
            (d.frame, c.lr_frame),
            (d.sequence, c.lr_sequence),
            (d.sync, c.lr_sync),
        )
        self.autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=config.precision == "bf16"
        )
        self.make_optimizers()

    def to(self, *target: torch.device | torch.dtype) -> "PlainTrainer":
        self.model.to(*target)
        self.discriminators.to(*target)
        return self

    def make_optimizers(self) -> None:
        self.for_model, *self.for_discriminators = (
            torch.optim.Adam(module.parameters(), rate, self.config.betas)
            for module, rate in self.rates
        )

    def step(self, batch: Batch, seed: int) -> dict[str, Tensor]:
        """One update of the discriminators and one of the generator; their loss terms."""
        size, d = self.config.model, self.discriminators
        n, stride, samples = size.snippet_frames, size.samples_per_frame, size.window
        rng = torch.Generator().manual_seed(seed)
        choice = choose(len(batch.frames), batch.frames.shape[1], n, rng)
        choice = Choice(*send(list(choice), batch.frames.device))
        state = rng.get_state()
        speech = take_audio(batch.audio, choice.snippet, stride, samples)
        shifted = take_audio(batch.audio, choice.shifted, stride, samples)

        def judge(video: Tensor, name: str) -> dict[str, Tensor]:
            frame = take_frames(video, choice.frame, 1).squeeze(1)
            snippet = take_frames(video, choice.snippet, n)
            return {
                f"frame_{name}": d.frame(frame, batch.still),
                f"sequence_{name}": d.sequence(video, batch.audio),
                f"sync_{name}": d.sync(snippet, speech),
            }

        with torch.no_grad(), self.autocast:
            fake = self.model(batch.still, batch.audio, rng)
        with self.autocast:
            logits = judge(fake, "fake") | judge(batch.frames, "real")
            snippet = take_frames(batch.frames, choice.snippet, n)
            logits["sync_shifted"] = d.sync(snippet, shifted)
            d_terms = {
                "d_frame": cross_entropy(logits["frame_real"], 1)
                + cross_entropy(logits["frame_fake"], 0),
                "d_sequence": cross_entropy(logits["sequence_real"], 1)
                + cross_entropy(logits["sequence_fake"], 0),
                "d_sync": cross_entropy(logits["sync_real"], 1)
                + 0.5 * cross_entropy(logits["sync_shifted"], 0)
                + 0.5 * cross_entropy(logits["sync_fake"], 0),
            }
        for optimizer in self.for_discriminators:
            optimizer.zero_grad()
        sum(d_terms.values()).backward()
        for optimizer in self.for_discriminators:
            optimizer.step()

        d.requires_grad_(False)
        rng.set_state(state)
        with self.autocast:
            fake = self.model(batch.still, batch.audio, rng)
            logits = judge(fake, "fake")
            error = (fake - batch.frames).abs()
            middle = size.height // 2
            g_terms = {
                "g_frame": cross_entropy(logits["frame_fake"], 1),
                "g_sequence": cross_entropy(logits["sequence_fake"], 1),
                "g_sync": 0.5 * cross_entropy(logits["sync_fake"], 1),
                "l1": error[..., middle:, :].mean(),
                "l1_top": error[..., :middle, :].mean(),
                "omega": torch.cat([p.flatten() for p in self.model.fusion.parameters()])
                .square()
                .mean(),
            }
            w = self.config.loss
            total = (
                w.frame * g_terms["g_frame"]
                + w.sequence * g_terms["g_sequence"]
                + w.sync * g_terms["g_sync"]
                + w.l1 * g_terms["l1"]
                + w.l1_top * g_terms["l1_top"]
                + w.omega * g_terms["omega"]
            )
        self.for_model.zero_grad()
        total.backward()
        self.for_model.step()
        d.requires_grad_(True)
        return {**d_terms, **g_terms, "generator": total}


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    """Binary cross-entropy of logits that should all say ``label``."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))
