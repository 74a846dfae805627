"""A step without the host: what it would take to record it, shown without a GPU."""

import contextlib
import dataclasses
import sys
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.train.helpers import CONFIG, CPU, TINY, batch, run, trainer
from train.config import PRESETS, parse
from train.device import lay_out, to_device
from train.errors import UserError
from train.trainer import gan
from train.trainer.draws import Draws, choose, draw, send
from train.trainer.gan import Trainer
from train.trainer.graph import RecordedUpdate, copy_into, tensors_of, why_not_recorded, with_copies

META = torch.device("meta")
#: Answers to the host, which would wait for them; sizes that depend on values; values of the host.
ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal.default")
MAKES = ("lift_fresh", "scalar_tensor")
#: Operators of a step of the paper's size, a recurrent layer and a normalisation counted as one.
LAUNCHES = 1220
if torch.__version__ < (2, 13):
    # Convolutions of tensors without values, which a GPU's are not, forget channels-last there: the
    # gradients of 30 weights are copied, each to memory of its own.
    LAUNCHES += 60


class Watch(TorchDispatchMode):
    """Count the operators, and note those that a recorded step must not have.

    ``crossings`` says of every copy between devices whether the host goes on meanwhile, and
    ``launches`` how many operators, views left out, compute on a device that is not the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.launches = 0
        self.crossings: list[bool] = []
        self.asked: list[str] = []
        self.wrong: list[str] = []
        self.copies: list[Tensor] = []
        self.scattered: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function).removeprefix("aten.")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        tensors = given + [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.operators[name] += not function.is_view
        places = {x.device for x in tensors}
        away = places - {CPU}
        asks = name.startswith(ASKS)
        filled = not name.startswith("empty")  # which moves nothing, and draws nothing
        if len(places) > 1 and filled:
            self.crossings.append(bool((kwargs or {}).get("non_blocking")))
        if away and asks:
            self.asked.append(name)
        self.launches += bool(away) and not function.is_view
        random = torch.Tag.nondeterministic_seeded in function.tags and filled
        if asks or name.startswith(MAKES) or random or (len(places) > 1 and filled):
            self.wrong.append(name)
        if name.startswith(("clone", "copy_", "contiguous")):
            self.copies.append(given[-1])
        if name.startswith(("convolution", "norm_activation")):
            maps = [x for x in given if x.ndim >= 4 and x.shape[-1] > 1]
            self.scattered += [f"{name} {tuple(x.shape)}" for x in maps if not channels_last(x)]
        return result


def channels_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.is_contiguous(memory_format=formats[x.ndim])


def drawn(config=CONFIG, seed: int = 0) -> Draws:
    rng = torch.Generator().manual_seed(seed)
    return draw(config.model, config.batch_size, config.frames, False, rng)


def as_on_a_gpu(config=CONFIG) -> tuple[Trainer, object]:
    """A trainer on the CPU whose weights, and a batch whose frames, lie as on a GPU."""
    made = Trainer(config, CPU)
    for module in made.modules.values():
        lay_out(module, META)
    made.make_optimizers()
    data = batch(config)
    for name in ("frames", "still"):
        x = getattr(data, name)
        maps = x.flatten(0, -4).contiguous(memory_format=torch.channels_last)
        setattr(data, name, maps.view(x.shape))
    return made, data


def test_an_update_takes_all_it_needs_from_tensors_that_are_there():
    """What an update asks of the host, or takes from it, would not be in its record."""
    t, data, draws = trainer(), batch(), drawn()
    with Watch() as watch:
        t.update(data, draws)
    assert watch.wrong == []


def test_an_update_is_a_function_of_its_tensors():
    """Recorded with one batch and launched with another: the same operators, other values."""
    ways, losses = [], []
    for seed in (0, 0, 1):
        t, data, draws = trainer(), batch(), drawn(seed=seed)
        torch.manual_seed(len(ways))  # would be heard by what draws for itself
        with Watch() as watch:
            terms = t.update(data, draws)
        ways.append(watch.operators)
        losses.append(torch.stack(list(terms.values())))
    assert ways[0] == ways[1] == ways[2]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_channels_are_last_from_the_frames_to_the_last_discriminator():
    t, data = as_on_a_gpu()
    draws = drawn()
    t.update(data, draws)
    with Watch() as watch:
        t.update(data, draws)
    # But the gradients of the skips, a map a clip: PyTorch sums them over the frames as it likes.
    m, clips = CONFIG.model, CONFIG.batch_size
    skips = [
        f"convolution_backward.default {(clips, c, m.height >> i, m.width >> i)}"
        for i, c in enumerate(m.channels(m.base_channels), 1)
    ]
    assert set(watch.scattered) <= set(skips)
    stacked = data.frames[:, : CONFIG.model.snippet_frames].numel()
    windows = CONFIG.batch_size * CONFIG.frames * CONFIG.model.window
    # Snippets, their frames stacked as channels; windows of speech, which overlap.
    assert {x.numel() for x in watch.copies if x.numel() >= stacked} <= {stacked, windows}


def test_the_layout_changes_no_loss():
    t, data = as_on_a_gpu()
    terms = t.update(data, drawn())
    expected = trainer().update(batch(), drawn())
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5)


def test_what_the_networks_draw_themselves_comes_from_the_source_that_a_graph_advances():
    """Dropout and other voices, of the form that learns from few people."""
    small = PRESETS["small"]
    sizes = {"height": 32, "width": 24, "depth": 3, "base_channels": 4, "audio_dim": 16}
    model = dataclasses.replace(small.model, **sizes, identity_dim=8, fused_dim=12, rank=4)
    config = dataclasses.replace(CONFIG, model=model, batch_size=2, frames=6)
    t, data = trainer(config), batch(config)
    context = t.model.context
    data.context, data.speech = context, torch.rand(2, (6 + 2 * context) * model.samples_per_frame)
    draws = draw(model, 2, 6, True, torch.Generator().manual_seed(0))
    with Watch() as watch:
        t.update(data, draws)  # with lips that nobody measured, and blinks
    assert {name.split(".")[0] for name in watch.wrong} == {"bernoulli_", "uniform_", "randn"}


@pytest.fixture
def on_meta(monkeypatch):
    """Let a trainer run without values on a device that is not the host, with fused operators.

    Autocast and Adam's fused form know nothing of that device, and a recurrent layer, one operator
    on a GPU, is a loop there.
    """
    from torch.optim import adam
    from torch.utils import _foreach_utils as utils

    from model import recurrent
    from polyfusion.ops import block, cp, final, norm

    class Recurrent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, size):
            ctx.x = x
            return x.new_empty(*x.shape[:2], size), x.new_empty(1, x.shape[0], size)

        @staticmethod
        def backward(ctx, *gradients):
            return torch.empty_like(ctx.x), None

    for module in (block, cp, final, norm):
        monkeypatch.setattr(module, "resolve", lambda *_args, **_options: "cuda")
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_options: contextlib.nullcontext())
    supported = [*utils._get_fused_kernels_supported_devices(), "meta"]
    for module in (utils, adam, sys.modules["torch.optim.optimizer"]):
        if hasattr(module, "_get_fused_kernels_supported_devices"):
            monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: supported)
    monkeypatch.setattr(
        recurrent.GRU, "forward", lambda self, x, hx=None: Recurrent.apply(x, self.hidden_size)
    )


def test_a_step_of_the_papers_size_crosses_to_the_device_once(on_meta):
    config = dataclasses.replace(PRESETS["paper"], precision="fp32")
    with META:
        t = Trainer(config, META)
        t.make_optimizers()
    size = config.model
    shape = (config.batch_size, config.frames, 3, size.height, size.width)
    items = {
        "frames": torch.zeros(shape, dtype=torch.uint8),
        "still": torch.zeros(shape[:1] + shape[2:], dtype=torch.uint8),
        "audio": torch.zeros(config.batch_size, config.frames * size.samples_per_frame),
    }
    with Watch() as watch:
        data = to_device(items, META)
    assert watch.crossings == [True] * 3  # every tensor, and the host waits for none
    t.step(data, torch.Generator().manual_seed(0))  # which makes Adam's moments
    with Watch() as watch:
        t.step(data, torch.Generator().manual_seed(0))
    assert watch.crossings == [True]
    assert watch.asked == []
    assert watch.launches <= LAUNCHES, watch.operators.most_common(20)


def test_draws_arrive_as_they_were_drawn():
    draws = draw(CONFIG.model, 3, 8, True, torch.Generator().manual_seed(0))
    values = tensors_of(draws)
    assert send(values, CPU) is values
    packed = [*send(values[::-1], META), *send(values, META)]
    for x, expected in zip(packed, [*values[::-1], *values], strict=True):
        assert (x.shape, x.dtype, x.device) == (expected.shape, expected.dtype, META)
    assert len({x.untyped_storage()._cdata for x in packed}) == 2
    again = draw(CONFIG.model, 3, 8, True, torch.Generator().manual_seed(0))
    assert all(map(torch.equal, tensors_of(again), values))
    rng = torch.Generator().manual_seed(0)
    choice = choose(3, 8, CONFIG.model.snippet_frames, rng)
    assert all(map(torch.equal, choice, values))  # the positions first


class Record:
    """In place of a CUDA graph of :func:`mean`: computed again from where the inputs lie."""

    def __init__(self, recorded: RecordedUpdate):
        self.recorded = recorded

    def replay(self) -> None:
        frames, noise = self.recorded.inputs[0], self.recorded.inputs[-1]
        self.recorded.terms.copy_(torch.stack([frames.mean(), noise.mean()]))


@pytest.fixture
def recorded(monkeypatch):
    """Make a :class:`RecordedUpdate` of a function, with a stand-in for CUDA's graphs."""
    stream = type("Stream", (), {"wait_stream": lambda *_: None})()
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _stream: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda *_a, **_o: contextlib.nullcontext())

    def make(update, must: bool = False) -> RecordedUpdate:
        made = RecordedUpdate(update, CPU, must)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Record(made))
        return made

    return make


def mean(data, draws) -> dict[str, Tensor]:
    return {"frames": data.frames.mean(), "noise": draws.noise.mean()}


def test_a_record_computes_with_every_new_batch(recorded):
    update = recorded(mean)
    results = []
    for seed in range(6):
        data, draws = batch(), drawn(seed=seed)
        data.frames += seed
        results.append((update(data, draws), mean(data, draws)))
    assert update.graph is not None
    for found, expected in results:  # and results stay what they are
        assert found == expected
    with pytest.raises(ValueError, match="expected those recorded"):
        update(batch(dataclasses.replace(CONFIG, frames=6)), drawn())


def test_a_step_that_cannot_be_recorded_goes_on_or_is_an_error(recorded, capsys):
    def fails(data, draws):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return mean(data, draws)

    calls: list[int] = []
    update = recorded(fails)
    results = [update(batch(), drawn()) for _ in range(6)]
    assert all(result == mean(batch(), drawn()) for result in results)
    said = capsys.readouterr().err
    assert said.count("not recorded in a CUDA graph, because that failed: operation not per") == 1
    calls.clear()
    update = recorded(fails, must=True)
    with pytest.raises(UserError, match="--graph on: the step could not be recorded"):
        [update(batch(), drawn()) for _ in range(6)]


def test_copies_lie_as_what_they_are_copies_of():
    _, data = as_on_a_gpu()
    copy = with_copies(data)
    for x, y in zip(tensors_of(copy), tensors_of(data), strict=True):
        assert torch.equal(x, y)
        assert x.data_ptr() != y.data_ptr()
    assert copy.frames.stride() == data.frames.stride()
    with pytest.raises(ValueError, match="a batch of shapes"):
        copy_into(tensors_of(data)[:1], tensors_of(data))


@pytest.mark.parametrize(
    ("args", "device", "reason"),
    [
        ([], "cpu", "the device is cpu"),
        ([], "cuda", None),
        (["--graph", "off"], "cuda", "--graph off"),
        (["--profile"], "cuda", "--profile times"),
        (["--system", "speech2vid"], "cuda", "--system speech2vid changes"),
    ],
)
def test_why_a_step_is_not_recorded(args, device, reason):
    config = parse(["--preset", "demo", *args])
    found = why_not_recorded(config, torch.device(device))
    assert found == reason or found.startswith(reason)
    if reason and config.graph == "auto":
        with pytest.raises(UserError, match=f"--graph on: {reason[:20]}"):
            why_not_recorded(dataclasses.replace(config, graph="on"), torch.device(device))


def test_the_command_says_how_it_launches_a_step(data, tmp_path, monkeypatch, capsys):
    args = [*TINY, "--data", str(data), "--steps", "1", "--out", str(tmp_path / "run")]
    assert run([*args, "--graph", "on"], monkeypatch) == 2
    assert "error: --graph on: the device is cpu" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run([*args, "--recompute", "off"], monkeypatch) == 0
    said = capsys.readouterr().out
    assert (
        "step      in pieces (the device is cpu, and graphs are CUDA's); activations kept" in said
    )


def test_activations_are_kept_or_made_again(on_meta):
    """What is made again is normalised once more."""
    made = []
    for recompute in (True, False):
        with META:
            t = Trainer(CONFIG, META)
            t.make_optimizers()
            data = batch()
        t.recompute = recompute
        draws = drawn().to(META)
        with Watch() as watch:
            t.update(data, draws)
        made.append(watch.operators["polyfusion.norm_activation.default"])
    assert made[0] >= made[1] + 2 * CONFIG.model.depth - 1


def test_a_gpu_keeps_activations_where_they_take_little(on_meta, monkeypatch):
    """The paper's take 1.4 GB in bfloat16."""
    config, gpu = PRESETS["paper"], torch.device("cuda")
    assert gan.activations(config.model) == 565_248
    monkeypatch.setattr(gan, "resolve", lambda kernels, _tensors: kernels.replace("auto", "triton"))
    monkeypatch.setattr(torch, "empty", lambda *_args, **_options: None)
    for memory, expected in ((80e9, False), (12e9, True)):
        found = type("Properties", (), {"total_memory": memory})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _d, found=found: found)
        assert gan.recomputes(config, gpu, True) == expected
    for device, changes in ((CPU, {}), (gpu, {"kernels": "eager"}), (gpu, {"recompute": "off"})):
        assert not gan.recomputes(dataclasses.replace(config, **changes), device, True)
    with pytest.raises(UserError, match="--recompute on with --kernels auto on cpu"):
        gan.recomputes(dataclasses.replace(config, recompute="on"), CPU, True)


def test_learning_rates_that_lie_on_a_device_stay_there():
    """A record reads them where they were."""
    t = trainer(dataclasses.replace(CONFIG, anneal=0.5, code_rate=0.1))
    groups = [group for optimizer in t.optimizers.values() for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = torch.tensor(group["lr"])
    places = [group["lr"] for group in groups]
    t.anneal(0.75)
    assert all(group["lr"] is place for group, place in zip(groups, places, strict=True))
    assert [x.item() for x in places] == pytest.approx([g["initial_lr"] / 2 for g in groups])


@pytest.fixture
def on_gpu():
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device("cuda")


def steps_on_gpu(device, record: bool, count: int = 8) -> list[dict[str, float]]:
    """Losses of training steps with batches and draws of their own."""
    t = Trainer(dataclasses.replace(CONFIG, kernels="auto"), device)
    t.make_optimizers()
    if record:
        t.record(must=True)
    losses = []
    for seed in range(count):
        t.anneal(seed / count)
        data = batch()
        items = {"frames": ((data.frames + 1) * 127.5).byte(), "audio": data.audio / (1 + seed)}
        items["still"] = items["frames"][:, 0]
        items = {name: x.pin_memory() for name, x in items.items()}
        terms = t.step(to_device(items, device), torch.Generator().manual_seed(seed))
        losses.append({name: value.item() for name, value in terms.items()})
    assert not record or t.run.graph is not None
    return losses


@pytest.mark.gpu
def test_a_recorded_step_has_the_losses_of_a_step(on_gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    recorded, plain = (steps_on_gpu(on_gpu, record) for record in (True, False))
    for found, expected in zip(recorded, plain, strict=True):
        assert found == pytest.approx(expected, rel=2e-2)  # bfloat16, and Adam's first steps ±lr


@pytest.mark.gpu
@pytest.mark.parametrize("record", [False, True])
def test_a_step_does_not_wait_for_the_device(on_gpu, record):
    t = Trainer(dataclasses.replace(CONFIG, kernels="auto"), on_gpu)
    t.make_optimizers()
    if record:
        t.record(must=True)
    data = batch()
    items = {"frames": data.frames.byte(), "still": data.frames[:, 0].byte(), "audio": data.audio}
    items = {name: x.pin_memory() for name, x in items.items()}
    for seed in range(6):
        if seed == 5:  # kernels are tuned, and the graph is recorded
            torch.cuda.set_sync_debug_mode("error")
        try:
            t.anneal(0.5)
            t.step(to_device(items, on_gpu), torch.Generator().manual_seed(seed))
        finally:
            torch.cuda.set_sync_debug_mode("default")
