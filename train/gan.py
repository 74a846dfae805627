"""One training step of the GAN: the three discriminators' update, then the generator's."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import Discriminators, TalkingFace
from train.config import LossConfig, TrainConfig
from train.losses import bottom_half, fake_loss, generator_loss, l1_loss, real_loss, top_half


@dataclass
class Batch:
    """What a step sees. frames (B, T, 3, H, W) in [−1, 1]; audio (B, T·s) in [−1, 1]."""

    frames: Tensor
    audio: Tensor

    @property
    def still(self) -> Tensor:
        """The identity image: the clip's first frame (B, 3, H, W)."""
        return self.frames[:, 0]


@dataclass
class Choice:
    """Random positions of a step, (B,) each: S(x), S_snip and the shifted audio of p_out."""

    frame: Tensor
    snippet: Tensor
    shifted: Tensor


def choose(batch: int, frames: int, snippet: int, generator: torch.Generator) -> Choice:
    """Draw a frame, a snippet start and an out-of-sync audio start for every clip.

    The out-of-sync audio is at least a snippet away, unless the clip is too short for that: then
    it is as far away as the clip allows.
    """
    starts = frames - snippet + 1
    frame = torch.randint(frames, (batch,), generator=generator)
    start = torch.randint(starts, (batch,), generator=generator)
    shifted = torch.empty_like(start)
    for i, s in enumerate(start.tolist()):
        distance = (torch.arange(starts) - s).abs()
        far = (distance >= min(snippet, int(distance.max()))).nonzero().squeeze(1)
        shifted[i] = far[torch.randint(len(far), (1,), generator=generator)]
    return Choice(frame, start, shifted)


def take_frames(video: Tensor, start: Tensor, count: int) -> Tensor:
    """Frames [start, start + count) of every clip: (B, T, …) → (B, count, …)."""
    index = start.to(video.device)[:, None] + torch.arange(count, device=video.device)
    return video[torch.arange(len(video), device=video.device)[:, None], index]


def take_audio(audio: Tensor, start: Tensor, stride: int, samples: int) -> Tensor:
    """``samples`` of every clip's audio from frame ``start`` on: (B, N) → (B, samples)."""
    index = (start * stride).to(audio.device)[:, None] + torch.arange(samples, device=audio.device)
    return audio.gather(1, index.clamp_max(audio.shape[1] - 1))


class Trainer:
    """The networks, their optimisers and the update rule.

    G and D_frame learn at 1e-4, D_seq and D_sync at 1e-5 in the paper (Adam). The generated video
    is made once and serves both updates.
    """

    def __init__(self, config: TrainConfig, device: torch.device):
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        self.model = TalkingFace(config.model, config.fusion, config.kernels).to(device)
        self.discriminators = Discriminators(config.model, config.kernels).to(device)
        bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        self.modules: dict[str, nn.Module] = {
            "model": self.model, "discriminators": self.discriminators,
        }  # fmt: skip
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def make_optimizers(self) -> None:
        """Create the optimisers, over what is trainable now (after freezing, before loading)."""
        c, d = self.config, self.discriminators
        rates = {
            "generator": (self.model, c.lr_generator),
            "frame": (d.frame, c.lr_frame),
            "sequence": (d.sequence, c.lr_seq),
            "sync": (d.sync, c.lr_sync),
        }
        self.optimizers = {
            name: torch.optim.Adam(
                [p for p in module.parameters() if p.requires_grad], lr, c.betas, fused=True
            )
            for name, (module, lr) in rates.items()
        }

    def anneal(self, progress: float) -> None:
        """Set the learning rates for a run that is ``progress`` (0 to 1) done."""
        share = self.config.anneal
        factor = min(1.0, (1 - progress) / share) if share else 1.0
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
                group["lr"] = group["initial_lr"] * factor

    def step(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Update the discriminators, then the generator; return every loss term (0-d tensors)."""
        size = self.config.model
        choice = choose(len(batch.frames), batch.frames.shape[1], size.snippet_frames, generator)
        with self.autocast:
            fake = self.model(batch.still, batch.audio, generator)  # (B, T, 3, H, W)
            logits = self._judge(batch, choice, fake.detach(), real=True)
            d_terms = discriminator_terms(logits)
        self._update(("frame", "sequence", "sync"), torch.stack(list(d_terms.values())).sum())

        self.discriminators.requires_grad_(False)
        with self.autocast:
            logits = self._judge(batch, choice, fake, real=False)
            g_terms = generator_terms(logits, self.config.loss)
            g_terms["l1"] = l1_loss(bottom_half(fake.float()), bottom_half(batch.frames))
            g_terms["l1_top"] = l1_loss(top_half(fake.float()), top_half(batch.frames))
            g_terms["omega"] = self._omega()
            total = weigh(g_terms, self.config.loss)
        self._update(("generator",), total)
        self.discriminators.requires_grad_(True)
        terms = {**d_terms, **g_terms, "generator": total}
        return {f"loss/{name}": value.detach() for name, value in terms.items()}

    def _judge(self, batch: Batch, choice: Choice, fake: Tensor, real: bool) -> dict[str, Tensor]:
        """Logits of every discriminator on the generated video and, if ``real``, the real one."""
        size, d = self.config.model, self.discriminators
        n, stride, samples = size.snippet_frames, size.samples_per_frame, size.window
        speech = take_audio(batch.audio, choice.snippet, stride, samples)

        def judge(video: Tensor, name: str) -> dict[str, Tensor]:
            frame = take_frames(video, choice.frame, 1).squeeze(1)
            snippet = take_frames(video, choice.snippet, n)
            return {
                f"frame_{name}": d.frame(frame, batch.still),
                f"sequence_{name}": d.sequence(video, batch.audio),
                f"sync_{name}": d.sync(snippet, speech),
            }

        logits = judge(fake, "fake")
        if real:
            logits |= judge(batch.frames, "real")
            shifted = take_audio(batch.audio, choice.shifted, stride, samples)
            snippet = take_frames(batch.frames, choice.snippet, n)
            logits["sync_shifted"] = d.sync(snippet, shifted)
        return {name: value.float() for name, value in logits.items()}

    def _omega(self) -> Tensor:
        """The Frobenius penalty Ω on the fusion parameters, eq (12)."""
        if self.config.loss.penalty == "none":
            return torch.zeros((), device=self.device)
        return self.model.fusion.frobenius_penalty(self.config.loss.penalty).to(self.device)

    def _update(self, names: tuple[str, ...], loss: Tensor) -> None:
        for name in names:
            self.optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        for name in names:
            self.optimizers[name].step()


def discriminator_terms(logits: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the discriminators minimise, eqs (10)-(11); the two fakes of D_sync count half each."""
    return {
        "d_frame": real_loss(logits["frame_real"]) + fake_loss(logits["frame_fake"]),
        "d_seq": real_loss(logits["sequence_real"]) + fake_loss(logits["sequence_fake"]),
        "d_sync": real_loss(logits["sync_real"])
        + 0.5 * fake_loss(logits["sync_shifted"])
        + 0.5 * fake_loss(logits["sync_fake"]),
    }


def generator_terms(logits: dict[str, Tensor], loss: LossConfig) -> dict[str, Tensor]:
    """The adversarial terms of the generator, unweighted."""
    return {
        "g_frame": generator_loss(logits["frame_fake"], loss.saturating),
        "g_seq": generator_loss(logits["sequence_fake"], loss.saturating),
        "g_sync": 0.5 * generator_loss(logits["sync_fake"], loss.saturating),
    }


def weigh(terms: dict[str, Tensor], loss: LossConfig) -> Tensor:
    """The generator's total, eq (12)."""
    return (
        loss.frame * terms["g_frame"]
        + loss.seq * terms["g_seq"]
        + loss.sync * terms["g_sync"]
        + loss.l1 * terms["l1"]
        + loss.l1_top * terms["l1_top"]
        + loss.omega * terms["omega"]
    )
