"""One training step of the GAN: the three discriminators' update, then the generator's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model import Discriminators, ModelConfig, TalkingFace
from polyfusion.dispatch import resolve
from polyfusion.ops.recompute import keep_activations
from train.config import LossConfig, TrainConfig
from train.device import Batch, in_interpreter, lay_out
from train.errors import UserError
from train.trainer.base import BaseTrainer
from train.trainer.draws import Draws, draw
from train.trainer.graph import RecordedUpdate
from train.trainer.losses import (
    bottom_half,
    eyes_loss,
    fake_loss,
    generator_loss,
    l1_loss,
    lips_loss,
    mouth_box,
    real_loss,
    top_half,
)


def take_frames(video: Tensor, start: Tensor, count: int) -> Tensor:
    """Frames [start, start + count) of every clip: (B, T, C, H, W) → (B, count, C, H, W).

    With the channels last, as a generated video lies in memory, so that its gradient does too.
    """
    index = start[:, None] + torch.arange(count, device=video.device)
    clips = torch.arange(len(video), device=video.device)[:, None]
    return video.permute(0, 1, 3, 4, 2)[clips, index].permute(0, 1, 4, 2, 3)


def take_audio(audio: Tensor, start: Tensor, stride: int, samples: int) -> Tensor:
    """``samples`` of every clip's audio from frame ``start`` on: (B, N) → (B, samples)."""
    index = (start * stride)[:, None] + torch.arange(samples, device=audio.device)
    return audio.gather(1, index.clamp_max(audio.shape[1] - 1))


#: The discriminators in the order of their updates. Their weights in LossConfig have these names,
#: their terms have them behind "d_" (what they minimise) and "g_" (what the generator does).
DISCRIMINATORS = ("frame", "sequence", "sync")


#: The parts of a frame with an L1 of their own; the weights in LossConfig have these names.
L1 = {"l1": bottom_half, "l1_top": top_half, "l1_mouth": mouth_box}


class Trainer(BaseTrainer):
    """The networks, their optimisers and the update rule.

    G and D_frame learn at 1e-4, D_seq and D_sync at 1e-5 in the paper (Adam). The generated video
    is made once and serves both updates; each term's graph is gone before the next one's is made.
    What a step draws at random is drawn before it, so that :meth:`update` needs nothing of the
    host and can be recorded (:mod:`train.trainer.graph`).
    """

    model: TalkingFace

    def __init__(self, config: TrainConfig, device: torch.device):
        super().__init__(config, device)
        # The interpreter shows that the kernels are right, at seconds a step: once is enough.
        kernels = "eager" if in_interpreter(config.kernels, device) else config.kernels
        self.discriminators = Discriminators(config.model, kernels).to(device)
        lay_out(self.discriminators, device)
        self.modules["discriminators"] = self.discriminators
        #: What :meth:`step` calls: :meth:`update`, or a record of it.
        self.run: Callable[[Batch, Draws], dict[str, Tensor]] = self.update
        self.recompute = recomputes(config, device, self.bf16)

    def record(self, must: bool = False) -> None:
        """Record the update in a CUDA graph after some steps; ``must`` makes a failure an error."""
        self.run = RecordedUpdate(self.update, self.device, must)

    def rates(self) -> dict[str, tuple[nn.Module, float]]:
        c, d = self.config, self.discriminators
        return {
            "generator": (self.model, c.lr_generator),
            "frame": (d.frame, c.lr_frame),
            "sequence": (d.sequence, c.lr_sequence),
            "sync": (d.sync, c.lr_sync),
        }

    def code_parameters(self) -> list[nn.Parameter]:
        return list(self.model.identity.head.parameters())

    def step(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Draw what is random, send it to the device and update every network."""
        clips, frames = batch.frames.shape[:2]
        eyes = self.config.model.eyes and batch.eyes is None
        draws = draw(self.config.model, clips, frames, eyes, rng)
        return self.run(batch, draws.to(self.device))

    def update(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Update the discriminators, then the generator; return every loss term (0-d tensors)."""
        weights = self.config.loss
        keep = keep_activations(not self.recompute)
        with self.section("generator forward"), self.autocast, keep:
            fake = self.model(
                batch.still,
                batch.speech,
                context=batch.context,
                noise=draws.noise,
                eyes=batch.eyes if draws.eyes is None else draws.eyes,
                lips=batch.lips,
            )  # (B, T, 3, H, W)
        terms = {}
        # A discriminator that counts for nothing is not trained: it would take most of a step.
        asked = [name for name in DISCRIMINATORS if getattr(weights, name) > 0]
        for name in asked:
            with self.section(f"{name} discriminator"):
                term = self._discriminator_term(name, batch, draws, fake.detach())
                self.optimizers[name].zero_grad(set_to_none=True)
                term.backward()
            with self.section("optimiser"):
                self.optimizers[name].step()
            terms[f"d_{name}"] = term.detach()

        # Every term leaves its gradient here, in turn; the sum is in float32, whatever fake is in.
        video = fake.detach().float().requires_grad_()
        total = torch.zeros((), device=self.device)
        with frozen(self.discriminators):
            for name in asked:
                with self.section(f"{name} discriminator"):
                    term = self._generator_term(name, batch, draws, video)
                    weighted = getattr(weights, name) * term
                    weighted.backward()
                terms[f"g_{name}"] = term.detach()
                total += weighted.detach()
        self.optimizers["generator"].zero_grad(set_to_none=True)
        with self.section("other losses"):
            terms["omega"] = self._omega()
            weighted = weights.omega * terms["omega"]
            for name, part in L1.items():
                weight = getattr(weights, name)
                if name == "l1_mouth" and not weight:
                    continue
                with torch.set_grad_enabled(weight > 0):
                    terms[name] = l1_loss(part(video), part(batch.frames))
                weighted = weighted + weight * terms[name]
            if weights.l1_eyes and batch.eyes is not None:
                terms["l1_eyes"] = eyes_loss(video, batch.frames, batch.eyes)
                weighted = weighted + weights.l1_eyes * terms["l1_eyes"]
            if self.model.lips is not None and batch.lips is not None:
                with self.autocast:
                    foretold = self.model.lips(batch.speech, batch.context)
                terms["lips"] = lips_loss(foretold.float(), batch.lips)
                weighted = weighted + weights.lips * terms["lips"]
            if weighted.requires_grad:
                weighted.backward()
        ends, slopes = [], []
        if video.grad is not None:
            ends.append(fake)
            slopes.append(video.grad.to(fake.dtype))
        drawn = self.model.composition.drawn
        if drawn is not None:
            terms["drawn"] = drawn.detach()
            ends.append(drawn)
            slopes.append(torch.full_like(drawn, weights.drawn))
        with self.section("generator backward"):
            if ends:
                torch.autograd.backward(ends, slopes)
        with self.section("optimiser"):
            self.optimizers["generator"].step()
        terms["generator"] = total + weighted.detach()
        return {f"loss/{name}": value.detach() for name, value in terms.items()}

    def _logits(self, name: str, batch: Batch, draws: Draws, video: Tensor) -> Tensor:
        """Logits (B,) of one discriminator on a video."""
        d = self.discriminators
        if name == "frame":
            return d.frame(take_frames(video, draws.frame, 1).squeeze(1), batch.still)
        if name == "sequence":
            return d.sequence(video, batch.audio)
        snippet = take_frames(video, draws.snippet, self.config.model.snippet_frames)
        return d.sync(snippet, self._speech(batch, draws.snippet))

    def _speech(self, batch: Batch, start: Tensor) -> Tensor:
        """The audio of a snippet from frame ``start`` on."""
        size = self.config.model
        return take_audio(batch.audio, start, size.samples_per_frame, size.window)

    def _discriminator_term(self, name: str, batch: Batch, draws: Draws, fake: Tensor) -> Tensor:
        """What a discriminator minimises, eqs (10)-(11); the two fakes of D_sync count half."""
        with self.autocast:
            if name == "sync":
                return self._sync_term(batch, draws, fake)
            on_fake = fake_loss(self._logits(name, batch, draws, fake).float())
            return on_fake + real_loss(self._logits(name, batch, draws, batch.frames).float())

    def _sync_term(self, batch: Batch, draws: Draws, fake: Tensor) -> Tensor:
        """D_sync's term: every snippet and every piece of audio is embedded once."""
        sync, count = self.discriminators.sync, self.config.model.snippet_frames
        seen = sync.see(take_frames(batch.frames, draws.snippet, count))
        heard = sync.audio(self._speech(batch, draws.snippet))
        shifted = sync.audio(self._speech(batch, draws.shifted))
        made = sync.see(take_frames(fake, draws.snippet, count))
        return (
            real_loss(sync.compare(seen, heard).float())
            + 0.5 * fake_loss(sync.compare(seen, shifted).float())
            + 0.5 * fake_loss(sync.compare(made, heard).float())
        )

    def _generator_term(self, name: str, batch: Batch, draws: Draws, video: Tensor) -> Tensor:
        """The generator's adversarial term of a discriminator, unweighted."""
        with self.autocast:
            logits = self._logits(name, batch, draws, video).float()
        return generator_term(name, logits, self.config.loss)

    def _omega(self) -> Tensor:
        """The Frobenius penalty Ω on the fusion parameters, eq (12)."""
        if self.config.loss.penalty == "none":
            return torch.zeros((), device=self.device)
        return self.model.fusion.frobenius_penalty(self.config.loss.penalty).to(self.device)


def activations(config: ModelConfig) -> int:
    """Values of one frame in the generator's activations that can be made again."""
    values = [
        channels * (config.height >> stage) * (config.width >> stage)
        for stage, channels in enumerate(config.channels(config.base_channels), 1)
    ]
    return 2 * sum(values) - values[0]  # two normalisations at every resolution but the last


def recomputes(config: TrainConfig, device: torch.device, bf16: bool) -> bool:
    """Whether the generator's activations are made again in the backward instead of kept.

    By default if keeping them would take a tenth of the GPU's memory or more. Raises
    :class:`UserError` if ``--recompute on`` asks for it where nothing can do it.
    """
    fused = device.type == "cuda" and resolve(config.kernels, [torch.empty(0, device=device)])
    if config.recompute == "off" or fused in (False, "eager"):
        if config.recompute == "on":
            raise UserError(
                f"--recompute on with --kernels {config.kernels} on {device}: only the fused "
                "kernels on a GPU make activations again; leave --recompute out"
            )
        return False
    kept = config.batch_size * config.frames * activations(config.model) * (2 if bf16 else 4)
    memory = torch.cuda.get_device_properties(device).total_memory
    return config.recompute == "on" or kept >= memory / 10


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within, no gradient of the module's parameters is computed."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def generator_term(name: str, logits: Tensor, loss: LossConfig) -> Tensor:
    """The generator's adversarial term of a discriminator, unweighted; a snippet counts half."""
    return (0.5 if name == "sync" else 1.0) * generator_loss(logits, loss.saturating)
