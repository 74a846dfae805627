"""The whole generator side: still and speech in, talking face out."""

import torch
from torch import Tensor, nn

from model.composition import Composition
from model.config import ModelConfig
from model.encoders import AudioEncoder, IdentityEncoder, NoiseEncoder
from model.eyes import SPREAD as EYES_SPREAD
from model.eyes import draw_eye_closure
from model.generator import Generator
from model.init import gaussian_init
from model.lips import SHAPE, SPREAD, LipsEncoder, exaggerate
from model.mel import MelAudioEncoder
from polyfusion.nn import make_fusion

ENCODERS = ("identity", "audio", "noise")


class TalkingFace(nn.Module):
    """Encoders, fusion (eqs (1)-(8) of the paper) and generator.

    Args:
        config: sizes.
        fusion: the form of fusion, one of ``polyfusion.nn.fusion.FUSIONS``.
        kernels: "auto", "eager", "triton" or "cuda", for every part that has fused operators.
    """

    def __init__(self, config: ModelConfig, fusion: str = "cp", kernels: str = "auto"):
        super().__init__()
        self.config, self.fusion_name = config, fusion
        self.identity = IdentityEncoder(config, kernels)
        mel = config.audio_encoder == "mel"
        self.audio: nn.Module = MelAudioEncoder(config) if mel else AudioEncoder(config)
        self.lips = LipsEncoder(config) if config.lips else None
        self.noise = NoiseEncoder(config)
        dims = [config.audio_dim + SHAPE * config.lips, config.identity_dim]
        behind = config.noise_dim + config.eyes  # the noise: concatenated, or a view of its own
        if config.fuse_noise:
            dims, behind = [*dims, behind], 0
        self.fusion = make_fusion(
            fusion,
            dims,
            config.fused_dim,
            rank=config.rank,
            within_view_degree=config.within_view_degree,
            kernels=kernels,
        )
        in_dim = self.fusion.out_features + behind
        self.generator: nn.Module = Generator(config, in_dim, kernels=kernels)
        self.composition = Composition(config.composition)
        for encoder in (self.identity, self.audio):
            encoder.apply(gaussian_init)
        self._encoders_frozen = False

    def freeze_encoders(self) -> None:
        """Stop training the encoders: weights and batch-norm statistics (the paper's protocol)."""
        self._encoders_frozen = True
        for name in ENCODERS:
            getattr(self, name).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "TalkingFace":
        super().train(mode)
        if self._encoders_frozen:
            for name in ENCODERS:
                getattr(self, name).eval()
        return self

    @property
    def context(self) -> int:
        """Frames of sound beyond both ends of a clip that :meth:`forward` can make use of."""
        return getattr(self.audio, "context", 0)

    def forward(
        self,
        still: Tensor,
        audio: Tensor,
        rng: torch.Generator | None = None,
        *,
        context: int = 0,
        noise: Tensor | None = None,
        eyes: Tensor | None = None,
        lips: Tensor | None = None,
    ) -> Tensor:
        """Animate stills.

        Args:
            still: (B, 3, H, W) in [−1, 1].
            audio: (B, N) in [−1, 1] at ``config.sample_rate``.
            rng: source of the noise and the blinks, for reproducible videos; not asked if both are
                given.
            context: frames of ``audio`` at both ends that are heard and not shown.
            noise: (B, T, n) what :func:`model.encoders.draw_noise` draws; drawn if not given.
            eyes: (B, T) how far the eyes are closed, 0 to 1, for a model with ``config.eyes``;
                drawn at random if not given.
            lips: (B, T, 3) shape of the lips, for a model with ``config.lips``; foretold by the
                sound if not given.

        Returns:
            Frames (B, T, 3, H, W) in [−1, 1], T = floor(N / config.samples_per_frame) − 2 context.
        """
        check_inputs(self.config, still, audio)
        speech = self.audio(audio, context) if context else self.audio(audio)  # (B, T, a)
        if self.lips is not None:
            if lips is None:
                lips = exaggerate(self.lips(audio, context), self.config.lips_gain)
            speech = torch.cat([speech, lips.to(speech) / SPREAD], -1)
        identity, skips = self.identity(still)  # (B, d)
        batch, frames, _ = speech.shape
        if noise is None:
            noise = self.noise.sample(batch, frames, rng)
        noise = self.noise(noise)
        if self.config.eyes:
            if eyes is None:
                eyes = draw_eye_closure(batch, frames, self.config.fps, rng)
                eyes = self.config.eyes_gain * eyes
            noise = torch.cat([noise, eyes.to(noise).unsqueeze(-1) / EYES_SPREAD], -1)
        if self.config.fuse_noise:
            fused = self.fusion(speech, identity, noise)
        else:
            fused = self.fusion(speech, identity, noise=noise)
        return self.composition(still, self.generator(fused, skips))


def check_inputs(config: ModelConfig, still: Tensor, audio: Tensor) -> None:
    """Raise ``ValueError`` unless still is (B, 3, H, W) and audio (B, N)."""
    expected = (3, config.height, config.width)
    if still.ndim != 4 or tuple(still.shape[1:]) != expected:
        raise ValueError(f"still: shape {tuple(still.shape)}, expected (B, {expected})")
    if audio.ndim != 2 or audio.shape[0] != still.shape[0]:
        raise ValueError(f"audio: shape {tuple(audio.shape)}, expected ({still.shape[0]}, samples)")
