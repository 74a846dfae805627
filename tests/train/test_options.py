"""Options beyond the paper: noise as a view, within-view polynomials, the patch discriminator."""

import copy
import dataclasses
import json

import pytest
import torch

from model import Discriminators, ModelConfig, TalkingFace
from model.discriminators import PatchSequenceDiscriminator
from model.folding import fold
from polyfusion import nn, ops
from polyfusion.nn.fusion import FUSIONS
from polyfusion.ops.reference import cmf_fusion_reference
from tests.library.helpers import TOLERANCE, relative_error
from tests.model.helpers import SMALL, inputs, parameters
from tests.train.helpers import CONFIG, batch, trainer
from train.config import TrainConfig, parse

NOISE = dataclasses.replace(SMALL, fuse_noise=True)
WITHIN = dataclasses.replace(SMALL, within_view_degree=3)
PATCH = dataclasses.replace(SMALL, sequence_disc="patch")
ALL = dataclasses.replace(SMALL, fuse_noise=True, within_view_degree=2, sequence_disc="patch")


def test_the_paper_has_none_of_them():
    config = ModelConfig()
    assert (config.fuse_noise, config.within_view_degree, config.sequence_disc) == (False, 1, "gru")
    assert parse(["--preset", "demo"]).model.sequence_disc == "gru"


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_a_within_view_polynomial_is_its_equation(degree):
    layer = nn.WithinView(5, degree).double()
    assert [tuple(u.shape) for u in layer.factors] == [(5, 5)] * degree
    z = torch.randn(4, 5, dtype=torch.float64)
    first = layer.factors[0]
    y = [[sum(first[i, j] * row[i] for i in range(5)) for j in range(5)] for row in z]
    for u in layer.factors[1:]:
        for row, values in zip(z, y, strict=True):
            for j in range(5):
                values[j] = sum(u[i, j] * row[i] for i in range(5)) * values[j] + values[j]
    torch.testing.assert_close(layer(z), torch.stack([torch.stack(row) for row in y]))


def test_its_degree_is_what_it_says():
    """Along a line through 0, a polynomial of degree N has vanishing (N+1)-th differences."""
    layer = nn.WithinView(5, 3).double()
    z = torch.arange(7, dtype=torch.float64)[:, None] * torch.randn(5, dtype=torch.float64)
    y = layer(z)
    assert y.diff(n=3, dim=0).abs().max() > 1e-3
    assert y.diff(n=4, dim=0).abs().max() < 1e-9 * y.abs().max()


def test_degree_one_is_the_identity_without_parameters():
    layer, z = nn.WithinView(5, 1), torch.randn(2, 5)
    assert layer(z) is z
    assert parameters(layer) == 0
    assert isinstance(nn.make_fusion("cp", (6, 5), 8, within_view_degree=1), nn.CPFusion)


@pytest.mark.parametrize("name", FUSIONS)
def test_the_fusion_sees_the_polynomials_and_omega_counts_them(name):
    layer = nn.make_fusion(name, (6, 5), 8, rank=3, within_view_degree=3)
    speech, identity, noise = torch.randn(2, 3, 6), torch.randn(2, 5), torch.randn(2, 3, 2)
    expected = layer.fusion(layer.within[0](speech), layer.within[1](identity), noise=noise)
    value = layer((speech, identity), noise=noise)
    assert torch.equal(value, expected)
    assert torch.equal(value[..., -2:], noise)
    assert value.shape[-1] == layer.out_features + 2
    own = sum(u.norm() for view in layer.within for u in view.factors)
    total = own + layer.fusion.frobenius_penalty()
    torch.testing.assert_close(layer.frobenius_penalty(), total)
    assert parameters(layer) == 3 * (36 + 25) + parameters(layer.fusion)
    layer.frobenius_penalty().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


def within(*views, kernels="auto"):
    """A polynomial fusion of views of 6 and 5 features, its kernels chosen afterwards."""
    layer = nn.make_fusion("cp", (6, 5), 8, within_view_degree=2)
    layer.kernels = kernels
    return layer(views)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nn.WithinView(5, 0), "degree: expected sizes of at least 1"),
        (lambda: nn.make_fusion("cp", (6, 5), 8, within_view_degree=0), "within_view_degree"),
        (lambda: nn.WithinView(5, 2)(torch.zeros(2, 4)), "view of 4 features: expected 5"),
        (
            lambda: nn.make_fusion("cp", (6, 5), 8, within_view_degree=2)([torch.zeros(2, 6)] * 3),
            "views: expected 2 tensors, got 3",
        ),
        (lambda: within(torch.zeros(2, 6), torch.zeros(2, 4)), r"views\[1\] has 4 features"),
        (lambda: within(torch.zeros(2, 6).int(), torch.zeros(2, 5)), r"views\[0\] has dtype"),
        (lambda: within(torch.zeros(2, 6), torch.zeros(2, 5), kernels="bogus"), "kernels='bogus'"),
        (lambda: nn.make_fusion("dense", (6, 5), 8, kernels="bogus"), "kernels='bogus'"),
        (lambda: dataclasses.replace(PATCH, depth=2), "sequence_disc='patch' with depth=2"),
        (lambda: dataclasses.replace(SMALL, within_view_degree=-1), "positive"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_fused_noise_is_a_fusion_of_three_views():
    model = TalkingFace(NOISE, "cp").eval()
    still, audio = inputs(NOISE)
    seen = []
    model.generator.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(still, audio, torch.Generator().manual_seed(3))
    noise = model.noise(model.noise.sample(2, 7, torch.Generator().manual_seed(3)))
    views = [model.audio(audio), model.identity(still)[0], noise]
    expected = ops.cp_fusion(views, list(model.fusion.factors), model.fusion.out)
    torch.testing.assert_close(seen[0], expected)
    assert seen[0].shape == (2, 7, SMALL.fused_dim)


def test_fused_noise_changes_the_frames():
    model = TalkingFace(NOISE, "cp")  # in training mode: untrained running statistics hide it
    still, audio = inputs(NOISE)
    a, b = (model(still, audio, torch.Generator().manual_seed(s)) for s in (3, 4))
    assert not torch.allclose(a, b)


@pytest.mark.parametrize("config", [NOISE, WITHIN, ALL], ids=["noise", "within", "all"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_trains_with_them(fusion, config):
    t = trainer(dataclasses.replace(CONFIG, model=config, fusion=fusion, batch_size=2, frames=5))
    before = {k: v.clone() for k, v in t.model.named_parameters()}
    terms = t.step(batch(t.config), torch.Generator().manual_seed(0))
    assert all(v.isfinite() for v in terms.values())
    for name, p in t.model.named_parameters():
        # A bias in front of a normalisation has no effect: its gradient is rounding, or exactly 0.
        without_effect = name.startswith("audio.windows.convs") and name.endswith("bias")
        assert without_effect or not torch.equal(p, before[name]), name
    if config.within_view_degree > 1:
        assert terms["loss/omega"] > 0


@pytest.mark.parametrize("kernels", ["eager", "triton"])
def test_they_run_with_every_kind_of_kernels(kernels):
    torch.manual_seed(0)
    layer = nn.make_fusion("cmf", (6, 5, 3), 8, rank=3, within_view_degree=2, kernels=kernels)
    views = torch.randn(2, 3, 6), torch.randn(2, 5), torch.randn(2, 3, 3)
    double = copy.deepcopy(layer).double()
    parts = double.fusion
    expected = cmf_fusion_reference(
        [w(v.double()) for w, v in zip(double.within, views, strict=True)],
        list(parts.first),
        list(parts.second),
        parts.out,
        parts.bias,
        None,
    )
    assert relative_error(layer(views), expected) < TOLERANCE[torch.float32]


def test_bf16_autocast_trains_with_all_of_them():
    t = trainer(dataclasses.replace(CONFIG, model=ALL, precision="bf16"))
    terms = t.step(batch(t.config), torch.Generator().manual_seed(0))
    assert all(v.isfinite() for v in terms.values())


@pytest.mark.parametrize("config", [NOISE, WITHIN], ids=["noise", "within"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_folding_changes_nothing_but_rounding(fusion, config):
    torch.manual_seed(0)
    model = TalkingFace(config, fusion)
    still, audio = inputs(config)
    for _ in range(20):
        model(still, audio)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    model.eval()
    folded = fold(model)
    with torch.no_grad():
        expected = model(still, audio, torch.Generator().manual_seed(0))
        value = folded(still, audio, torch.Generator().manual_seed(0))
    assert expected.std() > 0.01  # something to compare
    assert (value - expected).abs().max() < 1e-5


def test_patch_discriminator_gives_a_logit_per_clip_and_every_parameter_a_gradient():
    d = Discriminators(PATCH).sequence
    assert isinstance(d, PatchSequenceDiscriminator)
    _, audio = inputs(PATCH)
    video = torch.rand(2, 7, 3, 32, 24, requires_grad=True)
    logits = d(video, audio)
    assert logits.shape == (2,)
    logits.square().sum().backward()
    assert video.grad.abs().sum(dim=(2, 3, 4)).min() > 0  # every frame is looked at
    for name, p in d.named_parameters():
        assert p.grad.abs().sum() > 0, name


def test_patch_discriminator_judges_sound_and_picture_together():
    d = Discriminators(PATCH).sequence.eval().double()
    for p in d.parameters():
        p.data *= 5  # so that the logits are not all but 0
    audio = inputs(PATCH)[1].double()
    video = torch.rand(2, 7, 3, 32, 24, dtype=torch.float64)
    logits = d(video, audio)
    assert (logits - d(video.flip(1), audio)).abs().max() > 1e-4
    shift = audio.roll(3 * PATCH.samples_per_frame, 1)
    moved = d(video, shift) - logits
    other = d(video.flip(0), shift) - d(video.flip(0), audio)
    assert (moved - other).abs().max() > 1e-4  # what the sound adds depends on the picture


def test_a_patch_logit_sees_a_part_of_the_frame():
    config = dataclasses.replace(PATCH, height=96, width=96)
    d = Discriminators(config).sequence.eval()
    maps = []
    d.convs[-1].register_forward_hook(lambda *args: maps.append(args[2]))
    video = torch.rand(1, 5, 3, 96, 96, requires_grad=True)
    d(video, torch.zeros(1, 5 * config.samples_per_frame))
    assert maps[0].shape == (1, 1, 5, 12, 12)
    maps[0][0, 0, 2, 6, 6].backward()
    rows = video.grad.abs().sum(dim=(0, 1, 2, 4)).nonzero()
    assert len(rows) == 22  # 4, 10, 22: the receptive field of three layers


def test_the_patch_discriminator_trains():
    t = trainer(dataclasses.replace(CONFIG, model=PATCH))
    data = batch(t.config)
    first = t.step(data, torch.Generator().manual_seed(0))
    before = [p.clone() for p in t.discriminators.sequence.parameters()]
    t.step(data, torch.Generator().manual_seed(1))
    assert first["loss/d_sequence"].isfinite()
    for p, old in zip(t.discriminators.sequence.parameters(), before, strict=True):
        assert not torch.equal(p, old)


def test_flags_and_configurations_without_them():
    flags = ["--model.fuse-noise", "--model.within-view-degree", "2"]
    config = parse(["--preset", "demo", *flags, "--model.sequence-disc", "patch"])
    assert config.model == dataclasses.replace(
        parse(["--preset", "demo"]).model,
        fuse_noise=True,
        within_view_degree=2,
        sequence_disc="patch",
    )
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    old = parse(["--preset", "demo"]).to_dict()
    for name in ("fuse_noise", "within_view_degree", "sequence_disc"):
        del old["model"][name]
    for name in ("system", "deblur_share"):
        del old[name]
    assert TrainConfig.from_dict(old) == parse(["--preset", "demo"])
