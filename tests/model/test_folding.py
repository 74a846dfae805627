"""The folded generator is the same function."""

import dataclasses

import pytest
import torch

from model.folding import fold
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
    stage = fold(TalkingFace(SMALL, "cp").eval()).generator.stages[0]
    channels, height, width = stage.weight_x.shape[1], 4, 3
    x = torch.zeros(0, channels, height, width)
    assert stage(x, x).shape[0] == 0


def test_the_last_factor_is_gone():
    model = TalkingFace(SMALL, "cp")
    folded = fold(model)
    assert folded.generator.first_weight.shape[1] == SMALL.rank + SMALL.noise_dim
    assert not any("norm" in name for name, _ in folded.generator.named_parameters())


def test_wide_maps_take_the_blocks_convolutions(monkeypatch):
    """256 channels on 4×3 maps: one product per tap, folded or not."""
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
    assert taps == ["taps", "taps"]
    assert unfolded == 2 * taps
    assert (got - expected).abs().max() < 1e-5
