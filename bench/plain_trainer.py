"""The peer of the training step: the same update as one would write it from the papers.

The frames are generated once for the discriminators' update and once more for the generator's. Like
ours it does not compute the discriminators' weight gradients in the generator's update, and makes
the first video without a graph. On a GPU weights lie channels last and Adam is fused.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.straightforward import PlainTalkingFace, plain_copy
from model import Discriminators, TalkingFace
from train.config import TrainConfig
from train.device import Batch, lay_out
from train.trainer.draws import Draws, draw
from train.trainer.gan import take_audio, take_frames
from train.trainer.graph import RecordedUpdate, Update


class PlainTrainer:
    """The update rule of ``train.trainer.gan``; networks are called where needed."""

    def __init__(self, config: TrainConfig, model: TalkingFace, discriminators: Discriminators):
        self.config = c = config
        self.model = PlainTalkingFace(model)
        self.discriminators = d = plain_copy(discriminators)
        device = next(model.parameters()).device
        self.to(device)
        lay_out(self.model, device)
        lay_out(d, device)
        self.rates = (
            (self.model, c.lr_generator),
            (d.frame, c.lr_frame),
            (d.sequence, c.lr_sequence),
            (d.sync, c.lr_sync),
        )
        self.autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=config.precision == "bf16"
        )
        #: What :meth:`step` calls: :meth:`update`, or a record of it.
        self.run: Update = self.update
        self.make_optimizers()

    def to(self, *target: torch.device | torch.dtype) -> "PlainTrainer":
        self.model.to(*target)
        self.discriminators.to(*target)
        return self

    def make_optimizers(self) -> None:
        """Adam; on a GPU its fused form, which can be captured in a graph."""
        on_gpu = next(self.model.parameters()).is_cuda
        options = {"fused": True, "capturable": True} if on_gpu else {}
        self.for_model, *self.for_discriminators = (
            torch.optim.Adam(module.parameters(), rate, self.config.betas, **options)
            for module, rate in self.rates
        )

    def record(self, must: bool = False) -> None:
        """Record the update in a CUDA graph after some steps, as ours is."""
        self.run = RecordedUpdate(self.update, next(self.model.parameters()).device, must)

    def step(self, batch: Batch, seed: int) -> dict[str, Tensor]:
        """One update of the discriminators and one of the generator; their loss terms."""
        rng = torch.Generator().manual_seed(seed)
        draws = draw(self.config.model, *batch.frames.shape[:2], False, rng)
        return self.run(batch, draws.to(batch.frames.device))

    def update(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The update, with what is random in it drawn before."""
        size, d = self.config.model, self.discriminators
        n, stride, samples = size.snippet_frames, size.samples_per_frame, size.window
        speech = take_audio(batch.audio, draws.snippet, stride, samples)
        shifted = take_audio(batch.audio, draws.shifted, stride, samples)

        def judge(video: Tensor, name: str) -> dict[str, Tensor]:
            frame = take_frames(video, draws.frame, 1).squeeze(1)
            snippet = take_frames(video, draws.snippet, n)
            return {
                f"frame_{name}": d.frame(frame, batch.still),
                f"sequence_{name}": d.sequence(video, batch.audio),
                f"sync_{name}": d.sync(snippet, speech),
            }

        with torch.no_grad(), self.autocast:
            fake = self.model(batch.still, batch.audio, noise=draws.noise)
        with self.autocast:
            logits = judge(fake, "fake") | judge(batch.frames, "real")
            snippet = take_frames(batch.frames, draws.snippet, n)
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
        with self.autocast:
            fake = self.model(batch.still, batch.audio, noise=draws.noise)
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
