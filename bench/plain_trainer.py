"""The peer of the training step: the same update as one would write it from the papers.

The frames are generated once for the discriminators' update and once more for the generator's. Like
ours it does not compute the discriminators' weight gradients in the generator's update, and makes
the first video without a graph.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.straightforward import PlainTalkingFace, plain_copy
from model import Discriminators, TalkingFace
from train.config import TrainConfig
from train.device import Batch
from train.trainer.gan import choose, take_audio, take_frames


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
