"""Weights of the authors' fusion layer: loaded, the layers here compute the authors' formulas."""

import pytest
import torch

from polyfusion.nn import DenseFusion, WithinViewFusion, load_published, make_fusion
from tests.library.helpers import relative_error

DIMS, M, K = (5, 3, 2), 4, 3
COUPLED = DIMS[:2]  # of CMF with products: with three views ours has more of them
RANKS = (4, 3, 2, 2)  # of the Tucker forms, the output's first
WITH_ONE = [d + 1 for d in DIMS]

#: Names and shapes of the authors' weights, ``full_tensor_dims`` being (M, *dims) and multiview
#: adding 1 to each of the dims.
PUBLISHED = {
    "cp": {f"U_matrices.{i}": (d, K) for i, d in enumerate([M, *WITH_ONE])},
    "tucker": {"G": RANKS}
    | {f"U_matrices.{i}": pair for i, pair in enumerate(zip([M, *WITH_ONE], RANKS, strict=True))},
    "partial-tucker": {"B": (M, *RANKS[1:])}
    | {f"U_matrices.{i}": pair for i, pair in enumerate(zip(WITH_ONE, RANKS[1:], strict=True))},
    "tensor-train": {
        "cores.0": (1, M, K),
        "cores.1": (K, WITH_ONE[0], K),
        "cores.2": (K, WITH_ONE[1], K),
        "cores.3": (K, WITH_ONE[2], 1),
    },
    "cmf-first-order": {"b": (M,), "U": (M, K)}
    | {f"V_matrices.{i}": (d, K) for i, d in enumerate(DIMS)},
}
PUBLISHED["cmf"] = {"b": (M,), "U": (M, K)} | {
    f"{name}_matrices.{i}": (d, K) for name in "VU" for i, d in enumerate(COUPLED)
}
PUBLISHED["cmf-sr"] = PUBLISHED["cmf"]


def sizes(form):
    return COUPLED if form in ("cmf", "cmf-sr") else DIMS


def layer(form):
    ranks = {"tucker": RANKS, "partial-tucker": RANKS[1:]}.get(form)
    return make_fusion(form, sizes(form), M, rank=K, ranks=ranks, kernels="eager").double()


def weights(form):
    rng = torch.Generator().manual_seed(3)
    shapes = PUBLISHED[form]
    state = {n: torch.randn(s, generator=rng, dtype=torch.float64) for n, s in shapes.items()}
    if form == "cmf-sr":  # one list of matrices under two names
        state |= {f"U_matrices.{i}": state[f"V_matrices.{i}"] for i in range(len(COUPLED))}
    return state


def formula(form, state, sample):
    """The published formula for one sample, a list of vectors: z̃ (M,)."""
    rows = [torch.cat([x, torch.ones(1, dtype=x.dtype)]) for x in sample]
    u = [state[n] for n in sorted(state) if n.startswith("U_matrices")]
    v = [state[n] for n in sorted(state) if n.startswith("V_matrices")]
    match form:
        case "cp":
            product = torch.stack([x @ a for x, a in zip(rows, u[1:], strict=True)]).prod(0)
            return u[0] @ product
        case "tucker":
            code = [x @ a for x, a in zip(rows, u[1:], strict=True)]
            return u[0] @ torch.einsum("oabc,a,b,c->o", state["G"], *code)
        case "partial-tucker":
            code = [x @ a for x, a in zip(rows, u, strict=True)]
            return torch.einsum("oabc,a,b,c->o", state["B"], *code)
        case "tensor-train":
            chain = [
                torch.einsum("rds,d->rs", state[f"cores.{i + 1}"], x) for i, x in enumerate(rows)
            ]
            return (state["cores.0"][0] @ torch.linalg.multi_dot(chain))[:, 0]
    first = sum(x @ a for x, a in zip(sample, v, strict=True))
    if form != "cmf-first-order":
        first = first + torch.stack([x @ a for x, a in zip(sample, u, strict=True)]).prod(0)
    return state["b"] + state["U"] @ first


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("form", PUBLISHED)
def test_the_published_formula_with_the_published_weights(form, prefix):
    state, fuse = weights(form), layer(form)
    load_published(fuse, {prefix + name: value for name, value in state.items()})
    rng = torch.Generator().manual_seed(4)
    shapes = [(2, 6, DIMS[0]), (2, DIMS[1]), (2, 6, DIMS[2])][: len(sizes(form))]
    views = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]
    expected = torch.stack(
        [
            formula(form, state, [x[i] if x.ndim == 2 else x[i, t] for x in views])
            for i in range(2)
            for t in range(6)
        ]
    ).view(2, 6, M)
    assert relative_error(fuse(views), expected) < 1e-13
    assert all(p.requires_grad for p in fuse.parameters())


@pytest.mark.parametrize("form", PUBLISHED)
def test_every_wrong_tensor_is_named_and_the_layer_stays_what_it_was(form):
    names = list(PUBLISHED[form])
    missing, misshapen, single = names[0], names[1], names[2]
    state = weights(form)
    del state[missing]
    state[misshapen] = state[misshapen].unsqueeze(0)
    state[single] = state[single].float()
    state["scale"] = torch.ones(())
    fuse = layer(form)
    before = {name: value.clone() for name, value in fuse.state_dict().items()}
    with pytest.raises(ValueError, match="weights for") as error:
        load_published(fuse, state)
    message = str(error.value)
    shape = PUBLISHED[form][misshapen]
    assert f"{missing} is missing" in message
    assert f"{misshapen} has shape {(1, *shape)}, expected {shape}" in message
    assert f"{single} has dtype torch.float32, expected torch.float64" in message
    assert "scale is not known" in message
    assert message.count(";") == 3  # and nothing else is
    for name, value in fuse.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_shared_row_space_is_one():
    state, fuse = weights("cmf-sr"), layer("cmf-sr")
    before = fuse.out.clone()
    with pytest.raises(ValueError, match=r"U_matrices\.1 differs from V_matrices\.1"):
        load_published(fuse, state | {"U_matrices.1": state["U_matrices.1"] + 1})
    assert torch.equal(fuse.out, before)
    once = {name: value for name, value in state.items() if "U_matrices" not in name}
    load_published(fuse, once)  # files that keep shared values once have one of the names
    assert torch.equal(fuse.first[1], state["V_matrices.1"])


def test_what_is_no_tensor_and_forms_that_the_authors_do_not_have():
    load_published(make_fusion("concat", DIMS, M), {})
    with pytest.raises(ValueError, match="ConcatFusion: U is not known"):
        load_published(make_fusion("concat", DIMS, M), {"U": torch.ones(1)})
    with pytest.raises(ValueError, match="b is no tensor but list"):
        load_published(layer("cmf"), weights("cmf") | {"b": [1.0]})
    with pytest.raises(ValueError, match="CMFSRFusion of 3 views has products of two"):
        load_published(make_fusion("cmf-sr", DIMS, M), weights("cmf-sr"))
    for fuse in (DenseFusion(DIMS, M), WithinViewFusion(layer("cp"), 2)):
        with pytest.raises(ValueError, match=f"no form like {type(fuse).__name__}"):
            load_published(fuse, weights("cp"))
