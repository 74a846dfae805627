"""The objective and the update rule."""

import dataclasses
import math

import pytest
import torch

from tests.train.helpers import CONFIG, batch, trainer
from train.config import PRESETS, LossConfig
from train.metrics.quality import psnr
from train.trainer.draws import choose
from train.trainer.gan import generator_term, take_audio, take_frames
from train.trainer.losses import (
    bottom_half,
    fake_loss,
    generator_loss,
    l1_loss,
    real_loss,
    top_half,
)


def test_losses_are_binary_cross_entropies():
    logits = torch.tensor([0.3, -2.0, 4.0])
    p = torch.sigmoid(logits)
    assert real_loss(logits) == pytest.approx(-p.log().mean().item(), rel=1e-5)
    assert fake_loss(logits) == pytest.approx(-(1 - p).log().mean().item(), rel=1e-5)
    assert generator_loss(logits) == real_loss(logits)
    literal = (1 - p).log().mean().item()
    assert generator_loss(logits, saturating=True) == pytest.approx(literal, rel=1e-5)


def test_l1_sees_the_bottom_half_only():
    real, fake = torch.zeros(1, 2, 3, 8, 6), torch.zeros(1, 2, 3, 8, 6)
    fake[..., :4, :] = 1.0
    assert l1_loss(bottom_half(fake), bottom_half(real)) == 0
    assert l1_loss(top_half(fake), top_half(real)) == 1
    fake[..., 4:, :] = 0.5
    assert l1_loss(bottom_half(fake), bottom_half(real)) == 0.5


def test_psnr_of_a_known_error():
    real = torch.zeros(2, 3, 3, 4, 4)
    value = psnr(real + 0.2, real, colour=True)  # 0.1 of the range
    torch.testing.assert_close(value.float(), torch.full((2,), 20.0))


def test_objective_has_the_papers_weights():
    terms = trainer().step(batch(), torch.Generator().manual_seed(0))
    weights = {"g_frame": 1, "g_sequence": 0.2, "g_sync": 0.8, "l1": 600, "omega": 100}
    expected = sum(weight * terms[f"loss/{name}"] for name, weight in weights.items())
    torch.testing.assert_close(terms["loss/generator"], expected)


def test_every_weight_counts():
    for name in ("frame", "sequence", "sync", "l1", "l1_top", "omega"):
        none = dict.fromkeys(("frame", "sequence", "sync", "l1", "l1_top", "omega"), 0.0)
        loss = LossConfig(**none | {name: 2.0})
        terms = trainer(dataclasses.replace(CONFIG, loss=loss)).step(
            batch(), torch.Generator().manual_seed(0)
        )
        term = terms.get(f"loss/g_{name}", terms.get(f"loss/{name}"))
        torch.testing.assert_close(terms["loss/generator"], 2 * term)


def test_half_weight_of_the_generated_snippet():
    assert generator_term("sync", torch.zeros(4), LossConfig()) == pytest.approx(math.log(2) / 2)
    assert generator_term("frame", torch.zeros(4), LossConfig()) == pytest.approx(math.log(2))


def test_shifted_audio_does_not_overlap_its_snippet():
    for seed in range(20):
        c = choose(6, 20, 5, torch.Generator().manual_seed(seed))
        assert ((c.shifted - c.snippet).abs() >= 5).all()
        assert (c.snippet <= 15).all()
        assert (c.shifted <= 15).all()
        assert (c.frame < 20).all()


def test_shifted_audio_of_short_clips_is_as_far_as_it_goes():
    c = choose(50, 7, 5, torch.Generator().manual_seed(0))
    assert ((c.shifted - c.snippet).abs() >= 1).all()
    assert choose(2, 5, 5, torch.Generator()).shifted.tolist() == [0, 0]


def test_snippets_take_matching_video_and_audio():
    video = torch.arange(2 * 6).view(2, 6, 1, 1, 1)
    audio = torch.arange(2 * 60).view(2, 60)
    start = torch.tensor([1, 3])
    assert take_frames(video, start, 2).squeeze().tolist() == [[1, 2], [9, 10]]
    assert take_audio(audio, start, 10, 20)[:, 0].tolist() == [10, 90]


def test_a_step_moves_every_network_and_reports_every_term():
    t = trainer()
    before = {k: v.clone() for m in t.modules.values() for k, v in m.named_parameters()}
    terms = t.step(batch(), torch.Generator().manual_seed(0))
    adversarial = {f"{who}_{name}" for who in "dg" for name in ("frame", "sequence", "sync")}
    expected = adversarial | {"l1", "l1_top", "omega", "generator"}
    assert {f"loss/{name}" for name in expected} == terms.keys()
    for module in t.modules.values():
        for name, p in module.named_parameters():
            assert not torch.equal(p, before[name]), name


def test_the_generators_update_leaves_the_discriminators_alone():
    """A discriminator's update must be what it is without a generator's update after it."""
    a, b = trainer(), trainer()
    b.optimizers["generator"] = torch.optim.SGD(b.model.parameters(), 0.0)
    for t in (a, b):
        t.step(batch(), torch.Generator().manual_seed(0))
    for (name, p), q in zip(
        a.discriminators.named_parameters(), b.discriminators.parameters(), strict=True
    ):
        assert torch.equal(p, q), name
        assert p.requires_grad


def test_training_learns_to_reconstruct():
    t = trainer()
    data = batch()
    smooth = torch.nn.functional.interpolate(data.frames[:, 0, :, ::8, ::8], scale_factor=8)
    data.frames[:] = smooth[:, None]  # a still video of large squares
    first = t.step(data, torch.Generator().manual_seed(0))["loss/l1"].item()
    for i in range(40):
        last = t.step(data, torch.Generator().manual_seed(i))["loss/l1"].item()
    assert last < 0.8 * first


def test_bf16_autocast_trains():
    t = trainer(dataclasses.replace(CONFIG, precision="bf16"))
    terms = t.step(batch(), torch.Generator().manual_seed(0))
    assert all(v.isfinite() and v.dtype == torch.float32 for v in terms.values())


def test_the_videos_gradient_is_summed_in_float32(monkeypatch):
    """In bfloat16 what the L1 adds would be lost beside a larger gradient of a discriminator."""
    t = trainer(dataclasses.replace(CONFIG, precision="bf16"))
    seen = []
    logits = t._logits

    def spy(name, data, draws, video):
        if video.requires_grad:
            video.register_hook(lambda grad: seen.append((video.dtype, grad.dtype)))
        return logits(name, data, draws, video)

    monkeypatch.setattr(t, "_logits", spy)
    t.step(batch(), torch.Generator().manual_seed(0))
    assert seen
    assert set(seen) == {(torch.float32, torch.float32)}


def test_learning_rates_fall_over_the_last_share_of_the_steps():
    t = trainer(dataclasses.replace(CONFIG, anneal=0.5))
    rates = []
    for progress in (0.0, 0.5, 0.75, 1.0):
        t.anneal(progress)
        rates.append(t.optimizers["generator"].param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 0.0])
    t = trainer()
    t.anneal(0.99)
    assert t.optimizers["generator"].param_groups[0]["lr"] == 1e-3


def test_the_code_learns_at_a_rate_of_its_own():
    def moved(share: float) -> tuple[float, float]:
        t = trainer(dataclasses.replace(CONFIG, code_rate=share))
        watched = t.model.identity.head.weight, t.model.identity.convs[0].weight
        before = [weight.detach().clone() for weight in watched]
        t.step(batch(), torch.Generator().manual_seed(0))
        return tuple((w - b).abs().max().item() for w, b in zip(watched, before, strict=True))

    assert moved(1.0) == pytest.approx((1e-3, 1e-3), rel=1e-2)  # Adam's first step is the rate
    assert moved(0.01) == pytest.approx((1e-5, 1e-3), rel=1e-2)
    t = trainer(dataclasses.replace(CONFIG, code_rate=0.01, anneal=1.0))
    t.anneal(0.5)
    rates = [group["lr"] for group in t.optimizers["generator"].param_groups]
    assert rates == pytest.approx([5e-4, 5e-6])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_demo_step_takes_few_tiles_and_fills_them(monkeypatch):
    """The interpreter's time goes by tiles, and by their elements whether they are used or not."""
    from polyfusion.kernels.triton import final, hadamard, matmul, norm

    tiles = []

    def count(kernel, grid, *_arguments, **constants):
        size = math.prod(constants.get(f"BLOCK_{letter}", 1) for letter in "TPC")
        tiles.append((kernel.fn.__name__, math.prod(grid), size))

    for module in (final, hadamard, matmul, norm):
        monkeypatch.setattr(module, "launch", count)
    config = dataclasses.replace(PRESETS["demo"], kernels="triton")
    trainer(config).step(batch(config), torch.Generator().manual_seed(0))
    assert len(tiles) <= 72
    assert sum(number for _name, number, _size in tiles) <= 90
    size, clips = config.model, config.batch_size
    used = 0  # elements: two normalisations at every resolution per frame, one per still
    for i, channels in enumerate(size.channels(size.base_channels)):
        pixels = size.height * size.width >> 2 * (i + 1)
        per_frame = 1 if i == 0 else 2
        used += channels * pixels * clips * (config.frames * per_frame + 1)
    computed = sum(n * size for name, n, size in tiles if name == "_apply_kernel")
    assert computed <= 1.1 * used
