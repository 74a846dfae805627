"""One training step of Speech2Vid: the generator with L1 first, then the deblurring network."""

import torch
from torch import Tensor, nn

from model import Speech2Vid
from train.config import TrainConfig
from train.device import Batch
from train.trainer.base import BaseTrainer
from train.trainer.losses import bottom_half, l1_loss, top_half


class Trainer(BaseTrainer):
    """L1 training in two stages, over the whole frame.

    The last ``config.deblur_share`` of the steps train the deblurring network R with L1 on
    im + R(im) and leave the rest as it is, batch-norm statistics included. The learning rate falls
    (``config.anneal``) in each stage for itself. :meth:`anneal` says which stage it is.
    """

    model: Speech2Vid

    def __init__(self, config: TrainConfig, device: torch.device):
        super().__init__(config, device)
        self.stage = 1

    def rates(self) -> dict[str, tuple[nn.Module, float]]:
        lr = self.config.lr_generator
        return {"generator": (self.model.generator, lr), "deblur": (self.model.deblur, lr)}

    def anneal(self, progress: float) -> None:
        start = 1 - self.config.deblur_share
        self.stage = 1 if progress < start else 2
        self.model.freeze_generator(self.stage == 2)
        length = start if self.stage == 1 else self.config.deblur_share
        super().anneal((progress - (0 if self.stage == 1 else start)) / length)

    def step(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Update what the stage trains. Nothing here is random.

        ``loss/generator`` is the L1 that is minimised; ``loss/l1`` and ``loss/l1_top`` are its
        lower and upper half of the frame, as in the GAN's log.
        """
        first = self.stage == 1
        with self.section("generator forward"), self.autocast:
            with torch.set_grad_enabled(first):
                video = self.model.generator(batch.still, batch.speech, batch.context)
            if not first:
                video = self.model.deblur(video)
        with self.section("other losses"):
            video = video.float()
            total = l1_loss(video, batch.frames)
        optimizer = self.optimizers["generator" if first else "deblur"]
        with self.section("generator backward"):
            optimizer.zero_grad(set_to_none=True)
            total.backward()
        with self.section("optimiser"):
            optimizer.step()
        video = video.detach()
        return {
            "loss/l1": l1_loss(bottom_half(video), bottom_half(batch.frames)),
            "loss/l1_top": l1_loss(top_half(video), top_half(batch.frames)),
            "loss/generator": total.detach(),
        }
