"""The published system's checkpoints: their layout, and the same network as a ``TalkingFace``.

The system of Vougioukas et al. ("Realistic speech-driven facial animation with GANs", IJCV 2019)
is ours with concatenation as its fusion: its state dicts ``encoder``, ``encoder_id`` and
``generator`` hold the tensors that ``TalkingFace`` has, under other names. Two kinds are laid out
otherwise: the generator's first layer takes [speech, noise, identity], ours [speech, identity,
noise]; and a skip convolution is one ``ConvTranspose2d`` of [x, skip], ours two convolutions.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.talking_face import TalkingFace
from polyfusion.nn import merge_skip_weight, split_skip_weight

#: The state dicts of a checkpoint, whose tensors are named ``STATE.name`` here.
STATES = ("encoder", "encoder_id", "generator")
#: The sizes and rates that a checkpoint states, besides ``img_size``, all of them whole numbers.
WHOLE = (
    "audio_rate",
    "audio_feat_samples",
    "id_enc_dim",
    "rnn_gen_dim",
    "aud_enc_dim",
    "aux_latent",
)
#: Everything but tensors that describes the network.
VALUES = ("img_size", *WHOLE, "video_rate", "audio_feat_len", "sequential_noise")
#: The first layer of the image encoder, whose channels no value states.
STILL = "encoder_id.cl.0.0.weight"
FIRST = "generator.dcl.0.0.weight"
LARGEST = 1_000_000  # a size beyond it is no size


def published_config(values: Mapping[str, Any], base_channels: int) -> ModelConfig:
    """Give the sizes of a checkpoint that states ``values``, all of :data:`VALUES`.

    ``base_channels`` is the number of channels of its first image layer, 64 as published.
    ``ValueError`` names a value of the wrong kind, or of a network that ``TalkingFace`` cannot be.
    """
    sides = values["img_size"]
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(map(_is_whole, sides)):
        raise ValueError(f"img_size is {sides!r}: expected height and width in pixels")
    for name in WHOLE:
        if not _is_whole(values[name]):
            raise ValueError(f"{name} is {values[name]!r}: expected a whole number, 1 or more")
    for name, expected in {
        "rnn_gen_dim": values["aud_enc_dim"],
        "audio_feat_samples": values["audio_rate"] // 5,
        "audio_feat_len": 0.2,
        "sequential_noise": True,
    }.items():
        if values[name] != expected:
            raise ValueError(f"{name} is {values[name]!r}: expected {expected!r}")
    fps = values["video_rate"]
    if not isinstance(fps, int | float) or not 1 <= fps <= values["audio_rate"]:
        raise ValueError(f"video_rate is {fps!r}: expected frames per second")
    height, width = map(int, sides)
    return ModelConfig(
        height=height,
        width=width,
        depth=max(1, math.floor(math.log2(max(height, width))) - 2),
        base_channels=base_channels,
        identity_dim=int(values["id_enc_dim"]),
        audio_dim=int(values["aud_enc_dim"]),
        audio_layers=2,
        noise_dim=int(values["aux_latent"]),
        fps=float(fps),
        sample_rate=int(values["audio_rate"]),
    )


def published_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Give every tensor of a checkpoint of these sizes, by its name, without values."""
    with torch.device("meta"):
        return to_published(config, TalkingFace(config, "concat").state_dict())


def from_published(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make the state dict of ``TalkingFace(config, "concat")`` of a checkpoint's tensors."""
    state = {ours: tensors[theirs] for theirs, ours in _names(config)}
    for ours, theirs in _skip_convs(config):
        weights = split_skip_weight(tensors[theirs])
        state[f"{ours}.weight_x"], state[f"{ours}.weight_skip"] = weights
    sizes = [config.audio_dim, config.noise_dim, config.identity_dim]
    speech, noise, identity = tensors[FIRST].split(sizes)
    return state | {"generator.first.weight": torch.cat([speech, identity, noise])}


def to_published(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Invert :func:`from_published`, bit for bit."""
    tensors = {theirs: state[ours] for theirs, ours in _names(config)}
    for ours, theirs in _skip_convs(config):
        tensors[theirs] = merge_skip_weight(state[f"{ours}.weight_x"], state[f"{ours}.weight_skip"])
    sizes = [config.audio_dim, config.identity_dim, config.noise_dim]
    speech, identity, noise = state["generator.first.weight"].split(sizes)
    return tensors | {FIRST: torch.cat([speech, noise, identity])}


def _is_whole(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 1 <= value <= LARGEST and value == int(value)


def _skip_convs(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Our skip convolutions, and the tensor that the two weights of each are parts of."""
    for i in range(config.depth - 1):
        yield f"generator.skip_convs.{i}", f"generator.dcl.{i + 1}.dcl1.weight"


def _names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """A checkpoint's and our name of every tensor that is the same in both."""

    def conv(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
        for part in ("weight", "bias"):
            yield f"{theirs}.{part}", f"{ours}.{part}"

    def norm(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
        yield from conv(theirs, ours)
        for part in ("running_mean", "running_var", "num_batches_tracked"):
            yield f"{theirs}.{part}", f"{ours}.{part}"

    def gru(theirs: str, ours: str, layers: int) -> Iterator[tuple[str, str]]:
        for layer in range(layers):
            for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                yield f"{theirs}.{part}_l{layer}", f"{ours}.{part}_l{layer}"

    for i in range(5):
        yield from conv(f"encoder.encoder.cl.{i}", f"audio.windows.convs.{i}")
        yield from norm(f"encoder.encoder.activations.{i}.0", f"audio.windows.norms.{i}")
    yield from conv("encoder.encoder.cl.5", "audio.windows.head")
    yield from gru("encoder.rnn", "audio.rnn", config.audio_layers)
    for i in range(config.depth):
        yield f"encoder_id.cl.{i}.0.weight", f"identity.convs.{i}.weight"
        yield from norm(f"encoder_id.cl.{i}.1", f"identity.norms.{i}")
    yield f"encoder_id.cl.{config.depth}.0.weight", "identity.head.weight"
    yield from gru("generator.rnn_noise", "noise.rnn", 1)
    yield from norm("generator.dcl.0.1", "generator.first.norm")
    for i in range(config.depth - 1):
        stage = f"generator.dcl.{i + 1}"
        yield from norm(f"{stage}.activation1.0", f"generator.skip_convs.{i}.norm")
        yield f"{stage}.dcl2.weight", f"generator.up_convs.{i}.weight"
        yield from norm(f"{stage}.activation2.0", f"generator.up_convs.{i}.norm")
    yield f"generator.dcl.{config.depth}.weight", "generator.final.weight"
