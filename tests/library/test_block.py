"""The generator's blocks: values and gradients against the published form, memory, messages."""

import importlib
import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from polyfusion import ops
from polyfusion.kernels.triton import common, final
from polyfusion.nn import (
    CMFFusion,
    CPFusion,
    FinalBlock,
    FirstBlock,
    SkipConvBlock,
    TuckerFusion,
    UpConvBlock,
    merge_skip_weight,
    split_skip_weight,
)
from polyfusion.ops import conv
from polyfusion.ops.reference import (
    generator_reference,
    skip_conv_block_reference,
    up_conv_block_reference,
)
from tests.library.helpers import BLOCK_TOLERANCE, relative_error

# How kernels and convolution combine; None is what the size decides.
WAYS = [("eager", None), ("eager", "taps"), ("triton", None), ("triton", "own")]


def compare(module, oracle, inputs, dtype=torch.float32, tolerance=None):
    """Value and the gradients of inputs and parameters, against the oracle in float64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    weights = [p.detach().double().requires_grad_() for p in module.parameters()]
    expected = oracle(*exact, *weights)
    cotangent = torch.randn(expected.shape, dtype=torch.float64)
    wanted = [expected, *torch.autograd.grad(expected, [*exact, *weights], cotangent)]
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = module(*leaves)
    gradients = torch.autograd.grad(
        value, [*leaves, *module.parameters()], cotangent.to(value.dtype)
    )
    for found, exactly in zip([value, *gradients], wanted, strict=True):
        assert relative_error(found, exactly) < (tolerance or BLOCK_TOLERANCE[dtype])


def skip_oracle(x, skip, weight_x, weight_skip, norm_weight, norm_bias):
    weight = merge_skip_weight(weight_x, weight_skip)
    return skip_conv_block_reference(x, skip, weight, norm_weight, norm_bias)


def randomise(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5)
    return module


@pytest.mark.parametrize(("kernels", "method"), WAYS)
@pytest.mark.parametrize("dtype", BLOCK_TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    ("clips", "frames", "channels", "skip_channels", "size"),
    [(2, 3, 5, 7, (4, 3)), (1, 4, 17, 17, (3, 5)), (3, 1, 4, 2, (2, 1))],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_skip_conv_block(kernels, method, dtype, clips, frames, channels, skip_channels, size):
    torch.manual_seed(0)
    module = randomise(SkipConvBlock(channels, skip_channels, kernels, method)).to(dtype)
    x = torch.randn(clips * frames, channels, *size, dtype=dtype)
    skip = torch.randn(clips, skip_channels, *size, dtype=dtype)
    compare(module, skip_oracle, [x, skip], dtype)


@pytest.mark.parametrize(("kernels", "method"), WAYS)
@pytest.mark.parametrize("dtype", BLOCK_TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("channels", "size"), [((5, 3), (4, 3)), ((17, 9), (1, 2))])
@pytest.mark.usefixtures("poisoned_memory")
def test_up_conv_block(kernels, method, dtype, channels, size):
    torch.manual_seed(0)
    module = randomise(UpConvBlock(*channels, kernels=kernels, conv=method)).to(dtype)
    x = torch.randn(4, channels[0], *size, dtype=dtype)
    compare(module, up_conv_block_reference, [x], dtype)


@pytest.mark.parametrize("kernels", ["eager", "triton"])
@pytest.mark.parametrize(("channels", "size"), [(5, (4, 3)), (64, (3, 2)), (70, (1, 1))])
@pytest.mark.usefixtures("poisoned_memory")
def test_final_block(kernels, channels, size):
    torch.manual_seed(0)
    module = FinalBlock(channels, kernels=kernels)
    torch.nn.init.normal_(module.weight, 0.0, 0.1)

    def oracle(x, weight):
        return torch.conv_transpose2d(x, weight, stride=2, padding=1).tanh()

    compare(module, oracle, [torch.randn(3, channels, *size)])


@pytest.mark.parametrize(("rows", "maps"), [(1, 3), (4, 2), (3, 1), (9, 5)])
@pytest.mark.usefixtures("poisoned_memory")
def test_final_block_in_strips_tiles_and_groups(monkeypatch, rows, maps):
    """As a GPU runs it: strips of rows, tiles of columns, groups of maps, blocks of channels."""
    tile = {"BLOCK_P": 32, "BLOCK_W": 16, "BLOCK_C": 16, "BLOCK_O": 4}
    monkeypatch.setattr(final, "config", lambda *_: tile)

    def jobs(x, height, tile):
        strips, tiles = -(-height // rows), -(-x.shape[3] // (tile["BLOCK_W"] - 2))
        return strips, rows, tiles, -(-len(x) * strips // 2) * tiles

    monkeypatch.setattr(final, "_jobs", jobs)
    torch.manual_seed(0)
    module = FinalBlock(37, kernels="triton")
    torch.nn.init.normal_(module.weight, 0.0, 0.1)

    def oracle(x, weight):
        return torch.conv_transpose2d(x, weight, stride=2, padding=1).tanh()

    compare(module, oracle, [torch.randn(maps, 37, 7, 30)])


@pytest.mark.parametrize(("maps", "height", "width"), [(1200, 64, 48), (1, 64, 48), (7, 5, 200)])
def test_last_layer_fills_a_gpu(maps, height, width):
    """Every row and column has a strip, there are programs for 132 multiprocessors or rows."""
    x = torch.empty(maps, 64, height, width, dtype=torch.bfloat16, device="meta")
    with common.pretend(90):
        tile = final.config("forward", x, 3, common.arithmetic(x))
        strips, rows, tiles, jobs = final._jobs(x, height + 1, tile)
    assert strips * rows >= height + 1
    assert tiles * (tile["BLOCK_W"] - 2) >= width
    assert jobs >= min(132, maps * (height + 1))


@pytest.mark.parametrize("kernels", ["eager", "triton"])
def test_whole_generator(kernels):
    """Every block in a row, all gradients, against the published formulation."""
    torch.manual_seed(0)
    widths = (16, 8, 4)
    first = FirstBlock(6, widths[0], (2, 3), kernels)
    stages = [
        (SkipConvBlock(i, kernels=kernels), UpConvBlock(i, o, kernels=kernels))
        for i, o in itertools.pairwise(widths)
    ]
    final = FinalBlock(widths[-1], kernels=kernels)
    modules = torch.nn.ModuleList([first, *itertools.chain(*stages), final])
    for name, parameter in modules.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    z = torch.randn(6, 6)
    skips = [torch.randn(2, c, 2 * 2**i, 3 * 2**i) for i, c in enumerate(widths[:-1])]

    class Generator(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.modules_in_order = modules

        def forward(self, z, *skips):
            x = first(z)
            for (skip_conv, up_conv), skip in zip(stages, skips, strict=True):
                x = up_conv(skip_conv(x, skip))
            return final(x)

    def oracle(z, skip1, skip2, *p):
        stages = [
            ((merge_skip_weight(p[i], p[i + 1]), *p[i + 2 : i + 4]), p[i + 4 : i + 7])
            for i in (3, 10)
        ]
        return generator_reference(z, [skip1, skip2], p[:3], stages, p[17])

    compare(Generator(), oracle, [z, *skips], tolerance=1e-4)


def small_blocks(kernels, method):
    torch.manual_seed(0)
    skip_conv = randomise(SkipConvBlock(2, 1, kernels, method)).double()
    up_conv = randomise(UpConvBlock(2, 1, kernels=kernels, conv=method)).double()
    final = randomise(FinalBlock(1, 1, kernels=kernels)).double()
    x = torch.randn(2, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    skip = torch.randn(1, 1, 1, 2, dtype=torch.float64, requires_grad=True)
    weights = [skip_conv.weight_x, skip_conv.weight_skip, up_conv.weight, final.weight]
    return (lambda x, skip: final(up_conv(skip_conv(x, skip)))), [x, skip, *weights]


@pytest.mark.parametrize("method", [None, "taps"])
def test_gradients_of_first_and_second_order(method):
    function, leaves = small_blocks("eager", method)
    assert gradcheck(lambda x, skip, *_: function(x, skip), leaves, fast_mode=True)
    assert gradgradcheck(lambda x, skip, *_: function(x, skip), leaves, fast_mode=True)


@pytest.mark.parametrize("method", [None, "own"])
def test_second_order_in_triton(method):
    """A penalty on gradients, against the eager operators that gradgradcheck checks."""

    def penalty(kernels, method):
        function, leaves = small_blocks(kernels, method)
        y = function(*leaves[:2])
        grads = torch.autograd.grad((y * y.detach()).sum(), leaves, create_graph=True)
        loss = sum(grad.square().sum() for grad in grads)
        return torch.autograd.grad(loss, leaves)

    for found, expected in zip(penalty("triton", method), penalty("eager", None), strict=True):
        assert relative_error(found, expected) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("method", ["taps", "own"])
def test_convolutions_are_registered(method):
    x = torch.randn(2, 3, 2, 1, requires_grad=True)
    up = torch.randn(3, 2, 4, 4, requires_grad=True)
    weight = torch.randn(5, 3, 3, 3, requires_grad=True)
    opcheck(torch.ops.polyfusion.conv.default, (x, weight, 1, 1, method))
    opcheck(torch.ops.polyfusion.conv_transpose.default, (x, up, 2, 1, method))
    opcheck(torch.ops.polyfusion.conv_weight_grad.default, (x, x.detach(), 3, 1, 1, method))
    if method == "own":
        opcheck(
            torch.ops.polyfusion.conv_statistics.default,
            (x, weight, torch.randn(1, 5, 2, 1), 1, 1, False),
        )
        opcheck(torch.ops.polyfusion.conv_statistics.default, (x, up, None, 2, 1, True))


def test_final_block_is_registered():
    x, weight = torch.randn(2, 3, 2, 3, requires_grad=True), torch.randn(3, 3, 4, 4)
    opcheck(torch.ops.polyfusion.final_block.default, (x, weight.requires_grad_(), "triton"))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(1, 1, 0), (3, 1, 1), (4, 2, 1), (3, 1, 0), (3, 2, 1), (4, 3, 2)],
)
@pytest.mark.parametrize("method", ["taps", "own"])
def test_convolution_shapes(kernel, stride, padding, method):
    weight = torch.randn(3, 2, kernel, kernel, dtype=torch.float64)
    for size in ((7, 5), (6, 8)) if method == "taps" else ((4, 3),):
        x = torch.randn(2, 2, *size, dtype=torch.float64)
        expected = torch.conv2d(x, weight, stride=stride, padding=padding)
        found = conv._conv(x, weight, stride, padding, method)
        assert relative_error(found, expected) < 1e-12
        expected = torch.conv_transpose2d(found, weight, stride=stride, padding=padding)
        found = conv._conv_transpose(found, weight, stride, padding, method)
        assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("kernels", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_autocast(kernels, dtype):
    torch.manual_seed(0)
    skip_conv, up_conv = SkipConvBlock(8, 4, kernels), UpConvBlock(8, 4, kernels=kernels)
    final = FinalBlock(4, kernels=kernels)
    x, skip = torch.randn(4, 8, 4, 3), torch.randn(2, 4, 4, 3)
    expected = final(up_conv(skip_conv(x, skip)))
    with torch.autocast("cpu", dtype):
        y = skip_conv(x, skip)
        value = final(up_conv(y))
    assert (y.dtype, value.dtype) == (dtype, dtype)
    assert (value - expected).abs().max() < (0.02 if dtype == torch.float16 else 0.1)
    value.float().square().mean().backward()
    for name, parameter in skip_conv.named_parameters():
        assert parameter.grad.dtype == torch.float32, name


@pytest.mark.parametrize("kernels", ["eager", "triton"])
def test_compile_and_export(kernels):
    skip_conv, up_conv = SkipConvBlock(4, 2, kernels), UpConvBlock(4, 2, kernels=kernels)
    final = FinalBlock(2, kernels=kernels)
    whole = torch.nn.ModuleList([skip_conv, up_conv, final])

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = whole

        def forward(self, x, skip):
            return final(up_conv(skip_conv(x, skip)))

    model, x, skip = Whole(), torch.randn(4, 4, 4, 3), torch.randn(2, 2, 4, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x, skip).square().sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(x, skip).square().sum(), list(model.parameters()))
    for value, exactly in zip(found, expected, strict=True):
        assert relative_error(value, exactly) < 1e-4
    model.eval()
    exported = torch.export.export(model, (x, skip)).module()
    assert relative_error(exported(x, skip), model(x, skip)) < 1e-5
    with torch.inference_mode():
        assert relative_error(model(x, skip), exported(x, skip)) < 1e-5


@pytest.mark.parametrize("kernels", ["eager", "triton"])
def test_empty_batch(kernels):
    blocks = (SkipConvBlock(4, 2, kernels), UpConvBlock(4, 2, kernels=kernels))
    x, skip = torch.zeros(0, 4, 4, 3, requires_grad=True), torch.zeros(0, 2, 4, 3)
    y = blocks[1](blocks[0](x, skip))
    y = FinalBlock(2, kernels=kernels)(y)
    assert y.shape == (0, 3, 16, 12)
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("layer", [CPFusion, CMFFusion, TuckerFusion])
def test_rows_of_a_fused_result_begin_where_wide_loads_can(layer):
    """7 + 2 values of two bytes take the room of 16, in the result and in its gradient."""
    views = [torch.randn(2, 5, 6, dtype=torch.float16), torch.randn(2, 3, dtype=torch.float16)]
    fuse = layer((6, 3), 7, kernels="triton").half()
    z = fuse(*views, noise=torch.randn(2, 5, 2, dtype=torch.float16))
    assert z.shape == (2, 5, 9)
    assert z.stride() == (80, 16, 1)
    strides = []
    z.register_hook(lambda grad: strides.append(grad.stride()))
    blocks = [FirstBlock(9, 8, kernels=kernels).half() for kernels in ("triton", "eager")]
    blocks[1].load_state_dict(blocks[0].state_dict())
    leaves, results = list(fuse.parameters()), []
    for block, rows in zip(blocks, (z, z.contiguous()), strict=True):
        y = block(rows.flatten(0, 1))
        torch.manual_seed(1)
        cotangent = torch.randn_like(y)
        wanted = [*leaves, block.weight]
        results.append([y, *torch.autograd.grad(y, wanted, cotangent, retain_graph=True)])
    assert strides == [(80, 16, 1), (45, 9, 1)]
    for value, expected in zip(*results, strict=True):
        assert relative_error(value, expected) < 1e-2


def test_a_product_into_padded_rows_is_differentiated_twice():
    z = torch.randn(5, 8, dtype=torch.float64)[:, :6].requires_grad_()
    block = FirstBlock(6, 2, (1, 3)).double().eval()

    def twice(z, weight):
        block.weight = weight
        return block(z)

    del block.weight
    weight = torch.randn(6, 2, 1, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(twice, (z, weight))
    assert gradgradcheck(twice, (z, weight))


def test_checkpointing_runs_a_block_twice():
    runs = []
    blocks = [UpConvBlock(4, 4) for _ in range(3)]

    def function(x):
        runs.append(1)
        for up in blocks:
            x = up(x)
        return x

    x = torch.randn(2, 4, 2, 2, requires_grad=True)
    checkpoint(function, x, use_reentrant=False).sum().backward()
    assert len(runs) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_blocks_in_another_precision(dtype):
    block = UpConvBlock(4, 2).to(dtype)
    x = torch.randn(3, 4, 4, 3, dtype=dtype, requires_grad=True)
    y = block(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert all(p.grad.dtype == dtype for p in [x, *block.parameters()])
    assert block.eval()(x).dtype == dtype


@pytest.mark.parametrize("tf32", ["products", "convolutions"])
def test_each_precision_switch_reaches_its_own_kernels(tf32, fp32_precision, monkeypatch):
    """PyTorch has one switch for products and one for convolutions, with other defaults."""
    names = ("conv", "final", "hadamard")
    backends = {
        name: importlib.import_module(f"polyfusion.kernels.triton.{name}") for name in names
    }
    seen = {}
    for module, backend in backends.items():

        def spy(kernel, *rest, module=module, launch=backend.launch, **constants):
            seen.setdefault(module, set()).add(constants.get("PRECISION"))
            return launch(kernel, *rest, **constants)

        monkeypatch.setattr(backend, "launch", spy)
    rounded = {"products": ("tf32", "ieee"), "convolutions": ("ieee", "tf32")}[tf32]
    fp32_precision(*rounded)
    x = torch.randn(2, 4, 4, 3, requires_grad=True)
    ops.final_block(x, torch.randn(4, 3, 4, 4), kernels="triton").sum().backward()
    backends["conv"].conv(x.detach(), torch.randn(3, 4, 3, 3), 1, 1)
    views, factors = [torch.randn(1, 2, 3), torch.randn(1, 3)], [torch.randn(4, 2)] * 2
    ops.cp_fusion(views, factors, torch.randn(5, 2), kernels="triton")
    assert [seen[name] - {None} for name in ("hadamard", "final", "conv")] == [
        {rounded[0]}, {rounded[1]}, {rounded[1]},
    ]  # fmt: skip


def test_published_weights():
    weight = torch.randn(9, 4, 3, 3)
    x, skip = split_skip_weight(weight, 5)
    assert x.shape == (4, 4, 3, 3)
    assert skip.shape == (4, 5, 3, 3)
    assert torch.equal(merge_skip_weight(x, skip), weight)
    with pytest.raises(ValueError, match=r"weight has shape \(9, 4, 3, 3\): expected"):
        split_skip_weight(weight)


KERNEL = torch.zeros(3, 4, 3, 3)


def up_block(x=None, weight=None, **changes):
    """An up-convolution block of 4 channels to 3, with changed arguments."""
    arguments = {"norm_weight": torch.ones(3), "norm_bias": torch.zeros(3), **changes}
    x = torch.zeros(2, 4, 3, 3) if x is None else x
    return ops.up_conv_block(x, torch.zeros(4, 3, 4, 4) if weight is None else weight, **arguments)


def skip_block(**changes):
    """A skip convolution block of 4 and 4 channels to 3, with changed arguments."""
    arguments = {
        "x": torch.zeros(2, 4, 3, 3),
        "skip": torch.zeros(1, 4, 3, 3),
        "weight_x": KERNEL,
        "weight_skip": KERNEL,
        "norm_weight": torch.ones(3),
        "norm_bias": torch.zeros(3),
    }
    return ops.skip_conv_block(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: SkipConvBlock(4)(torch.zeros(4, 3, 4, 3), torch.zeros(2, 4, 4, 3)),
            ValueError,
            "x has 3 channels, expected 4 as axis 1",
        ),
        (
            lambda: SkipConvBlock(4)(torch.zeros(4, 4, 4, 3), torch.zeros(3, 4, 4, 3)),
            ValueError,
            "skip has 3 clips, expected a divisor of the 4 frames",
        ),
        (
            lambda: SkipConvBlock(4)(torch.zeros(4, 4, 4, 3), torch.zeros(2, 4, 4, 4)),
            ValueError,
            r"skip has shape \(2, 4, 4, 4\), expected the height and width",
        ),
        (
            lambda: UpConvBlock(4, 2)(torch.zeros(4, 4, 3)),
            ValueError,
            r"x: expected a tensor \(N, C, H, W\), got \(4, 4, 3\)",
        ),
        (
            lambda: FinalBlock(4)(torch.zeros(4, 4, 3, 3).double()),
            ValueError,
            "x is torch.float64 on cpu, expected torch.float32",
        ),
        (
            lambda: UpConvBlock(4, 2, conv="fast")(torch.zeros(4, 4, 3, 3)),
            ValueError,
            "conv='fast': expected None or one of",
        ),
        (
            lambda: UpConvBlock(4, 2, kernels="eager", conv="own")(torch.zeros(4, 4, 3, 3)),
            ops.KernelsUnavailable,
            "use kernels='triton'",
        ),
        (
            lambda: ops.final_block(torch.zeros(1, 2, 3, 3), torch.zeros(2, 3, 3, 3)),
            ValueError,
            r"expected \(C, out, 4, 4\)",
        ),
        (
            lambda: ops.final_block(torch.zeros(1, 2, 3, 3).cfloat(), torch.zeros(2, 3, 4, 4)),
            ValueError,
            "x has dtype torch.complex64, expected one of float16",
        ),
        (
            lambda: ops.final_block(
                torch.zeros(1, 2, 3, 3), torch.zeros(2, 65, 4, 4), kernels="triton"
            ),
            ops.KernelsUnavailable,
            "at most 64 channels",
        ),
        (
            lambda: up_block(norm_weight=torch.ones(2), kernels="triton", conv="own"),
            ValueError,
            r"norm_weight has shape \(2,\), expected \(3,\)",
        ),
        (
            lambda: up_block(norm_bias=torch.ones(3, dtype=torch.int)),
            ValueError,
            "norm_bias has dtype torch.int32",
        ),
        (
            lambda: up_block(norm_weight=torch.ones(3, device="meta")),
            ValueError,
            "norm_weight is on meta, expected cpu",
        ),
        (
            lambda: up_block(mean=torch.ones(3)),
            ValueError,
            "mean and var: expected both or neither",
        ),
        (lambda: up_block(weight=torch.zeros(4, 3, 4, 2)), ValueError, "the last two alike"),
        (
            lambda: up_block(
                torch.zeros(1, 4, 1, 1),
                torch.zeros(4, 3, 1, 1),
                stride=1,
                padding=0,
                kernels="triton",
                conv="own",
            ),
            ValueError,
            "one value per channel",
        ),
        (
            lambda: up_block(torch.zeros(1, 4, 1, 1), torch.zeros(4, 3, 1, 1)),
            ValueError,
            "is not empty",
        ),
        (
            lambda: skip_block(skip=torch.zeros(1, 4, 3, 3).double(), weight_skip=KERNEL.double()),
            ValueError,
            "skip is torch.float64 on cpu, expected torch.float32 on cpu as x",
        ),
        (
            lambda: skip_block(
                skip=torch.zeros(1, 4, 3, 3, device="meta"), weight_skip=KERNEL.to("meta")
            ),
            ValueError,
            "skip is torch.float32 on meta",
        ),
        (
            lambda: skip_block(weight_x=torch.zeros(3, 4, 5, 5)),
            ValueError,
            r"weight_x has shape \(3, 4, 5, 5\), expected \(C_out, C, 3, 3\)",
        ),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()
