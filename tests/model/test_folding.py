"""The folded generator is the same function."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from model.folding import fold
from model.packed import PackedConv
from model.streaming import Stream
from model.talking_face import TalkingFace
from polyfusion.ops import conv
from tests.model.helpers import SMALL, inputs


@pytest.mark.parametrize("fusion", ["cp", "tucker", "cmf", "cmf-sr", "dense", "concat"])
def test_folding_changes_nothing_but_rounding(fusion):
    torch.manual_seed(0)
    model = TalkingFace(SMALL, fusion)
    still, audio = inputs(SMALL)
    for _ in range(20):  # statistics and parameters that are not the initial ones
        model(still, audio)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = fold(model)
    with torch.no_grad():
        expected = model(still, audio, torch.Generator().manual_seed(0))
        got = folded(still, audio, torch.Generator().manual_seed(0))
    assert expected.std() > 0.01  # something to compare
    assert (got - expected).abs().max() < 1e-5
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_empty_batch_is_folded_too():
    folded = fold(TalkingFace(SMALL, "cp").eval())
    for module in (*folded.generator.skip_convs, *folded.generator.up_convs):
        x = torch.zeros(0, module.weight.shape[0 if module.up else 1], 4, 3)
        assert module(x).shape[0] == 0


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_packed_convolutions_are_convolutions(up, relu, dtype):
    """In every dtype, plain or by autocast, for more frames and larger maps than the first."""
    torch.manual_seed(0)
    weight, bias = torch.randn(8, 6, 4, 4) / 10, torch.randn(6 if up else 8)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    packed = PackedConv(weight.to(wide), bias.to(wide), 2, up, relu)
    convolve = F.conv_transpose2d if up else F.conv2d
    for module in (packed, copy.deepcopy(packed)):
        for n, h, w in ((1, 4, 2), (5, 4, 2), (2, 8, 6), (1, 4, 2)):
            x = torch.randn(n, 8 if up else 6, h, w)
            expected = convolve(x.double(), weight.double(), bias.double(), 2, 1)
            expected = expected.relu() if relu else expected
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                got = module(x.to(wide))
            assert got.dtype == dtype
            error = 0.02 if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(got.double(), expected, rtol=error, atol=error)


def test_a_stream_convolves_its_stills_skips_once():
    folded = fold(TalkingFace(SMALL, "cp").eval())
    calls = []
    for module in folded.identity.skip_convs:
        module.register_forward_hook(lambda *_: calls.append(1))
    still, audio = inputs(SMALL)
    stream = Stream(folded, still[0], piece=1)
    frames = [*stream.push(audio[0]), *stream.finish()]
    assert len(frames) > 1
    assert len(calls) == len(folded.identity.skip_convs)


def test_the_last_factor_is_gone():
    model = TalkingFace(SMALL, "cp")
    folded = fold(model)
    assert folded.generator.first_weight.shape[1] == SMALL.rank + SMALL.noise_dim
    assert not any("norm" in name for name, _ in folded.generator.named_parameters())


def test_wide_maps_take_the_blocks_convolutions(monkeypatch):
    """256 channels on 4×3 maps: one product per tap, folded or not, but for single stills."""
    taps = []
    original = conv._conv
    monkeypatch.setattr(conv, "_conv", lambda *a: taps.append(a[-1]) or original(*a))
    torch.manual_seed(0)
    model = TalkingFace(dataclasses.replace(SMALL, base_channels=64), "cp")
    still, audio = inputs(SMALL)
    model(still, audio)
    model.eval()
    folded = fold(model)
    with torch.no_grad():
        expected = model(still, audio, torch.Generator().manual_seed(0))
        unfolded, taps[:] = list(taps), []
        got = folded(still, audio, torch.Generator().manual_seed(0))
    assert taps == ["taps"]  # the frames'
    assert unfolded == 4 * taps  # and the stills', in training and in evaluation
    assert (got - expected).abs().max() < 1e-5
