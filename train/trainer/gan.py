"""One training step of the GAN: the three discriminators' update, then the generator's."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import Discriminators, TalkingFace
from train.config import LossConfig, TrainConfig
from train.device import Batch, in_interpreter
from train.trainer.base import BaseTrainer
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


@dataclass
class Choice:
    """Random positions of a step, (B,) each: S(x), S_snip and the shifted audio of p_out."""

    frame: Tensor
    snippet: Tensor
    shifted: Tensor


def choose(batch: int, frames: int, snippet: int, rng: torch.Generator) -> Choice:
    """Draw a frame, a snippet start and an out-of-sync audio start for every clip.

    The out-of-sync audio is at least a snippet away, unless the clip is too short for that: then
    it is as far away as the clip allows.
    """
    starts = frames - snippet + 1
    frame = torch.randint(frames, (batch,), generator=rng)
    start = torch.randint(starts, (batch,), generator=rng)
    shifted = torch.empty_like(start)
    for i, s in enumerate(start.tolist()):
        distance = (torch.arange(starts) - s).abs()
        far = (distance >= min(snippet, int(distance.max()))).nonzero().squeeze(1)
        shifted[i] = far[torch.randint(len(far), (1,), generator=rng)]
    return Choice(frame, start, shifted)


def take_frames(video: Tensor, start: Tensor, count: int) -> Tensor:
    """Frames [start, start + count) of every clip: (B, T, …) → (B, count, …)."""
    index = start.to(video.device)[:, None] + torch.arange(count, device=video.device)
    return video[torch.arange(len(video), device=video.device)[:, None], index]


def take_audio(audio: Tensor, start: Tensor, stride: int, samples: int) -> Tensor:
    """``samples`` of every clip's audio from frame ``start`` on: (B, N) → (B, samples)."""
    index = (start * stride).to(audio.device)[:, None] + torch.arange(samples, device=audio.device)
    return audio.gather(1, index.clamp_max(audio.shape[1] - 1))


#: The discriminators in the order of their updates. Their weights in LossConfig have these names,
#: their terms have them behind "d_" (what they minimise) and "g_" (what the generator does).
DISCRIMINATORS = ("frame", "sequence", "sync")


class Trainer(BaseTrainer):
    """The networks, their optimisers and the update rule.

    G and D_frame learn at 1e-4, D_seq and D_sync at 1e-5 in the paper (Adam). The generated video
    is made once and serves both updates; each term's graph is gone before the next one's is made.
    """

    model: TalkingFace

    def __init__(self, config: TrainConfig, device: torch.device):
        super().__init__(config, device)
        # The interpreter shows that the kernels are right, at seconds a step: once is enough.
        kernels = "eager" if in_interpreter(config.kernels, device) else config.kernels
        self.discriminators = Discriminators(config.model, kernels).to(device)
        self.modules["discriminators"] = self.discriminators

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
        """Update the discriminators, then the generator; return every loss term (0-d tensors)."""
        size, weights = self.config.model, self.config.loss
        choice = choose(len(batch.frames), batch.frames.shape[1], size.snippet_frames, rng)
        with self.section("generator forward"), self.autocast:
            fake = self.model(
                batch.still,
                batch.speech,
                rng,
                context=batch.context,
                eyes=batch.eyes,
                lips=batch.lips,
            )  # (B, T, 3, H, W)
        terms = {}
        # A discriminator that counts for nothing is not trained: it would take most of a step.
        asked = [name for name in DISCRIMINATORS if getattr(weights, name) > 0]
        for name in asked:
            with self.section(f"{name} discriminator"):
                term = self._discriminator_term(name, batch, choice, fake.detach())
                self.optimizers[name].zero_grad(set_to_none=True)
                term.backward()
            with self.section("optimiser"):
                self.optimizers[name].step()
            terms[f"d_{name}"] = term.detach()

        self.discriminators.requires_grad_(False)
        # Every term leaves its gradient here, in turn; the sum is in float32, whatever fake is in.
        video = fake.detach().float().requires_grad_()
        total = torch.zeros((), device=self.device)
        for name in asked:
            with self.section(f"{name} discriminator"):
                term = self._generator_term(name, batch, choice, video)
                weighted = getattr(weights, name) * term
                weighted.backward()
            terms[f"g_{name}"] = term.detach()
            total += weighted.detach()
        self.discriminators.requires_grad_(True)
        self.optimizers["generator"].zero_grad(set_to_none=True)
        with self.section("other losses"):
            l1 = l1_loss(bottom_half(video), bottom_half(batch.frames))
            l1_top = l1_loss(top_half(video), top_half(batch.frames))
            l1_mouth = l1_loss(mouth_box(video), mouth_box(batch.frames))
            omega = self._omega()
            weighted = weights.l1 * l1 + weights.l1_top * l1_top + weights.omega * omega
            weighted = weighted + weights.l1_mouth * l1_mouth
            if weights.l1_eyes and batch.eyes is not None:
                terms["l1_eyes"] = eyes_loss(video, batch.frames, batch.eyes)
                weighted = weighted + weights.l1_eyes * terms["l1_eyes"]
            if self.model.lips is not None and batch.lips is not None:
                with self.autocast:
                    foretold = self.model.lips(batch.speech, batch.context)
                terms["lips"] = lips_loss(foretold.float(), batch.lips)
                weighted = weighted + weights.lips * terms["lips"]
            weighted.backward()
        ends = [fake]
        slopes: list[Tensor | None] = [None if video.grad is None else video.grad.to(fake.dtype)]
        drawn = self.model.composition.drawn
        if drawn is not None:
            terms["drawn"] = drawn.detach()
            ends.append(drawn)
            slopes.append(torch.full_like(drawn, weights.drawn))
        with self.section("generator backward"):
            torch.autograd.backward(ends, slopes)
        with self.section("optimiser"):
            self.optimizers["generator"].step()
        terms |= {"l1": l1.detach(), "l1_top": l1_top.detach(), "omega": omega.detach()}
        if weights.l1_mouth:
            terms["l1_mouth"] = l1_mouth.detach()
        terms["generator"] = total + weighted.detach()
        return {f"loss/{name}": value.detach() for name, value in terms.items()}

    def _logits(self, name: str, batch: Batch, choice: Choice, video: Tensor) -> Tensor:
        """Logits (B,) of one discriminator on a video."""
        d = self.discriminators
        if name == "frame":
            return d.frame(take_frames(video, choice.frame, 1).squeeze(1), batch.still)
        if name == "sequence":
            return d.sequence(video, batch.audio)
        snippet = take_frames(video, choice.snippet, self.config.model.snippet_frames)
        return d.sync(snippet, self._speech(batch, choice.snippet))

    def _speech(self, batch: Batch, start: Tensor) -> Tensor:
        """The audio of a snippet from frame ``start`` on."""
        size = self.config.model
        return take_audio(batch.audio, start, size.samples_per_frame, size.window)

    def _discriminator_term(self, name: str, batch: Batch, choice: Choice, fake: Tensor) -> Tensor:
        """What a discriminator minimises, eqs (10)-(11); the two fakes of D_sync count half."""
        with self.autocast:
            if name == "sync":
                return self._sync_term(batch, choice, fake)
            on_fake = fake_loss(self._logits(name, batch, choice, fake).float())
            return on_fake + real_loss(self._logits(name, batch, choice, batch.frames).float())

    def _sync_term(self, batch: Batch, choice: Choice, fake: Tensor) -> Tensor:
        """D_sync's term: every snippet and every piece of audio is embedded once."""
        sync, count = self.discriminators.sync, self.config.model.snippet_frames
        seen = sync.see(take_frames(batch.frames, choice.snippet, count))
        heard = sync.audio(self._speech(batch, choice.snippet))
        shifted = sync.audio(self._speech(batch, choice.shifted))
        made = sync.see(take_frames(fake, choice.snippet, count))
        return (
            real_loss(sync.compare(seen, heard).float())
            + 0.5 * fake_loss(sync.compare(seen, shifted).float())
            + 0.5 * fake_loss(sync.compare(made, heard).float())
        )

    def _generator_term(self, name: str, batch: Batch, choice: Choice, video: Tensor) -> Tensor:
        """The generator's adversarial term of a discriminator, unweighted."""
        with self.autocast:
            logits = self._logits(name, batch, choice, video).float()
        return generator_term(name, logits, self.config.loss)

    def _omega(self) -> Tensor:
        """The Frobenius penalty Ω on the fusion parameters, eq (12)."""
        if self.config.loss.penalty == "none":
            return torch.zeros((), device=self.device)
        return self.model.fusion.frobenius_penalty(self.config.loss.penalty).to(self.device)


def generator_term(name: str, logits: Tensor, loss: LossConfig) -> Tensor:
    """The generator's adversarial term of a discriminator, unweighted; a snippet counts half."""
    return (0.5 if name == "sync" else 1.0) * generator_loss(logits, loss.saturating)
