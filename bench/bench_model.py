"""Whole networks: the generator, inference on one clip, and a step of the GAN's training."""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.bench_block import maps_last
from bench.bench_fusion import choose_kernels, fused_kernels
from bench.machine import pick_device
from bench.measure import (
    COMPILED,
    COMPILED_REWRITTEN,
    FOLDED,
    PUBLISHED,
    REWRITTEN,
    Comparison,
    Operator,
    Procedure,
    Workload,
)
from bench.plain_trainer import PlainTrainer
from bench.rewritten import SharedGenerator, rewritten
from bench.straightforward import (
    PlainGenerator,
    PlainTalkingFace,
    plain_copy,
    published_fusion,
)
from model import TalkingFace
from model.encoders import audio_windows
from model.folding import fold
from model.generator import Generator
from train.config import PRESETS, TrainConfig
from train.device import Batch, lay_out, to_device
from train.trainer.gan import Trainer
from train.trainer.graph import WARM

DEVICE = pick_device()
ON_GPU = DEVICE.type == "cuda"
#: Clips and frames of a step: the paper's on a GPU, fewer of the paper's frames on a CPU.
STEPS = {"demo": (8, 15), "paper": (16, 75) if ON_GPU else (1, 25)}
CHECKED = 2, 6
"""Clips and frames at which a training step is compared with the oracle."""
CLIP, STREAM = 75, 5
"""Frames of inference on a clip at once, and one by one."""


def comparisons() -> list[Comparison]:
    """Generator and training step at both sizes, inference of a clip at once and by frames."""
    made = []
    for dtype in ("bfloat16", "float32") if ON_GPU else ("float32", "bfloat16"):
        made += [generator_comparison(preset, dtype) for preset in STEPS]
        made += [step_comparison(preset, dtype) for preset in STEPS]
        made += [inference_comparison(p, stream, dtype) for p in STEPS for stream in (True, False)]
    return made


def generator_comparison(preset: str, dtype: str = "float32") -> Comparison:
    """Forward, and forward with backward, of the generator alone."""
    compiled = ON_GPU or (preset, dtype) == ("paper", "float32")
    variants = [PUBLISHED, *([COMPILED] if compiled else []), REWRITTEN]
    variants += [COMPILED_REWRITTEN] if compiled else []
    variants += fused_kernels()
    clips, frames = STEPS[preset]
    build = functools.partial(build_generator, preset, tuple(variants), dtype)
    return Comparison(
        "generator",
        preset,
        tuple(variants),
        build,
        DEVICE,
        dtype,
        ("forward", "both"),
        tolerance=1e-2 if dtype == "float32" else 0.3,
        size={"clips": clips, "frames": frames},
    )


def build_generator(preset: str, variants: tuple[str, ...], dtype: str) -> Workload:
    """The generator in training mode; bf16 runs under autocast."""
    torch.manual_seed(0)
    config = PRESETS[preset].model
    clips, frames = STEPS[preset]
    generator = Generator(config, config.fused_dim + config.noise_dim).to(DEVICE)
    plain = PlainGenerator(generator).to(DEVICE)
    exact = copy.deepcopy(plain).double()
    lay_out(plain, DEVICE)
    shared = SharedGenerator(generator).to(DEVICE)
    lay_out(shared, DEVICE)
    z = torch.randn(clips, frames, config.fused_dim + config.noise_dim, device=DEVICE)
    z.requires_grad_()
    skips = [
        maps_last(
            torch.randn(clips, c, config.height >> (i + 1), config.width >> (i + 1), device=DEVICE)
        )
        .relu()
        .requires_grad_()
        for i, c in enumerate(config.channels(config.base_channels))
    ][1:]
    grad = torch.randn(clips, frames, 3, config.height, config.width, device=DEVICE)
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bfloat16")

    def subject(variant: str) -> Operator:
        if variant in (PUBLISHED, COMPILED):
            module = plain
        elif ON_GPU and variant in (REWRITTEN, COMPILED_REWRITTEN):
            module = shared
        else:
            module = copy.deepcopy(generator)
            choose_kernels(module, variant)
        call = torch.compile(module, dynamic=False) if variant.startswith("compile") else module

        def function() -> Tensor:
            with autocast:
                return call(z, skips).float()

        return Operator(function, [z, *skips, *module.parameters()], grad, compared=1)

    def oracle() -> dict[str, list[Tensor]]:
        inputs = [x.detach().double().requires_grad_() for x in (z, *skips)]
        function = functools.partial(exact, inputs[0], inputs[1:])
        return Operator(function, inputs, grad.double(), compared=1).results()

    subjects = {name: subject(name) for name in variants}
    return Workload(subjects, oracle, frames=clips * frames)  # type: ignore[arg-type]


def inference_comparison(preset: str, stream: bool, dtype: str = "float32") -> Comparison:
    """One clip through the whole model in evaluation mode, at once or frame by frame."""
    variants = (PUBLISHED, REWRITTEN, FOLDED, *fused_kernels())
    frames = STREAM if stream else CLIP
    name = f"{preset}, {'frame by frame' if stream else f'clip of {CLIP} frames'}"
    build = functools.partial(build_inference, preset, stream, variants, dtype)
    return Comparison(
        "inference",
        name,
        variants,
        build,
        DEVICE,
        dtype,
        ("forward",),
        tolerance=1e-3 if dtype == "float32" else 0.1,
        size={"clips": 1, "frames": frames},
    )


def build_inference(preset: str, stream: bool, variants: tuple[str, ...], dtype: str) -> Workload:
    """Still and speech in, frames out; the oracle makes the clip at once."""
    torch.manual_seed(0)
    config = PRESETS[preset].model
    frames = STREAM if stream else CLIP
    model = TalkingFace(config, "cp", "eager").to(DEVICE)
    plain = PlainTalkingFace(model).to(DEVICE)
    lay_out(plain, DEVICE)
    still = torch.rand(1, 3, config.height, config.width, device=DEVICE) * 2 - 1
    audio = torch.rand(1, frames * config.samples_per_frame, device=DEVICE) * 2 - 1
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bfloat16")
    video = [torch.empty(1, frames, 3, config.height, config.width)]

    def animate(module: nn.Module) -> Tensor:
        with torch.no_grad(), autocast:
            call = functools.partial(one_by_one, module) if stream else module
            return call(still, audio, torch.Generator().manual_seed(0))

    def subject(variant: str) -> Procedure:
        module = plain if variant == PUBLISHED else copy.deepcopy(model)
        if ON_GPU and variant == REWRITTEN:
            module = rewritten(model)
        choose_kernels(module, variant)
        lay_out(module, DEVICE)
        module = fold(module.eval()) if variant == FOLDED else module
        call = functools.partial(animate, module.eval())
        traffic = total_bytes([*module.parameters(), still, audio, *video])
        return Procedure("forward", call, lambda: [call()], traffic)

    def oracle() -> dict[str, list[Tensor]]:
        exact = copy.deepcopy(plain).double().eval()
        with torch.no_grad():
            noise = torch.Generator().manual_seed(0)
            return {"forward": [exact(still.double(), audio.double(), noise)]}

    return Workload({name: subject(name) for name in variants}, oracle, frames, config.fps)


def one_by_one(model: nn.Module, still: Tensor, audio: Tensor, rng: torch.Generator) -> Tensor:
    """The video, each frame made before the next one's audio window is looked at."""
    encoder = model.audio
    windows = audio_windows(audio, encoder.window, encoder.stride)
    identity, skips = model.identity(still)
    noise = model.noise.sample(*windows.shape[:2], rng)
    hidden = noise_hidden = None
    frames = []
    for t in range(windows.shape[1]):
        features, hidden = encoder.rnn(encoder.windows(windows[:, t]).unsqueeze(1), hidden)
        smooth, noise_hidden = model.noise.rnn(noise[:, t : t + 1], noise_hidden)
        views, smooth = [features, identity], torch.tanh(smooth)
        if isinstance(model, PlainTalkingFace):
            z = published_fusion(model.fusion, views, smooth)
        else:
            z = model.fusion(*views, noise=smooth)
        frames.append(model.generator(z, skips))
    return torch.cat(frames, 1)


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all of them together."""
    return sum(x.numel() * x.element_size() for x in tensors)


def step_comparison(preset: str, dtype: str = "float32") -> Comparison:
    """A whole training step against the straightforward implementation of the same networks."""
    variants = (PUBLISHED, REWRITTEN, *fused_kernels())
    clips, frames = STEPS[preset]
    build = functools.partial(build_step, preset, variants, dtype)
    return Comparison(
        "training step",
        preset,
        variants,
        build,
        DEVICE,
        dtype,
        ("step",),
        tolerance=1e-2 if dtype == "float32" else 0.3,
        size={"clips": clips, "frames": frames},
    )


def build_step(preset: str, variants: tuple[str, ...], dtype: str) -> Workload:
    """Trainers with the same weights; compared by their losses in a step after a step."""
    clips, frames = STEPS[preset]
    precision = "bf16" if dtype == "bfloat16" else "fp32"
    config = dataclasses.replace(
        PRESETS[preset], precision=precision, batch_size=clips, frames=frames, kernels="eager"
    )
    start = Trainer(config, DEVICE)
    batch, small = random_batch(config, clips, frames), random_batch(config, *CHECKED)

    def trainer_of(variant: str) -> PlainTrainer | Trainer:
        if variant == PUBLISHED:
            return PlainTrainer(config, start.model, start.discriminators)
        trainer = Trainer(config, DEVICE)  # the same seed, so the same weights
        if ON_GPU and variant == REWRITTEN:
            use_plain_modules(trainer)
        for module in trainer.modules.values():
            choose_kernels(module, variant)
        trainer.make_optimizers()
        return trainer

    weights = [p for module in start.modules.values() for p in module.parameters()]
    # weights and two moments are read and written, the batch is read
    traffic = 6 * total_bytes(weights) + total_bytes([batch.frames, batch.audio])

    def subject(variant: str) -> Procedure:
        trainer = trainer_of(variant)
        step, call = stepper(trainer), functools.partial(stepper(trainer), batch, 0)
        record = functools.partial(recorded, trainer, call)
        return Procedure("step", call, lambda: losses(step, small), traffic, record)

    def oracle() -> dict[str, list[Tensor]]:
        exact = PlainTrainer(
            dataclasses.replace(config, precision="fp32"), start.model, start.discriminators
        ).to(torch.float64)
        exact.make_optimizers()
        doubled = Batch(small.frames.double(), small.audio.double())
        return {"step": losses(exact.step, doubled)}

    return Workload({name: subject(name) for name in variants}, oracle, frames=clips * frames)


def stepper(trainer: PlainTrainer | Trainer) -> Callable[[Batch, int], dict[str, Tensor]]:
    """A step by its batch and the seed of what is random in it."""
    if isinstance(trainer, PlainTrainer):
        return trainer.step
    return lambda batch, seed: trainer.step(batch, torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def recorded(trainer: PlainTrainer | Trainer, call: Callable[[], Any]) -> Iterator[Callable]:
    """The step captured in a graph, after the steps before that."""
    trainer.record(must=True)
    try:
        for _ in range(WARM + 1):
            call()
        yield call
    finally:
        trainer.run = trainer.update


def use_plain_modules(trainer: Trainer) -> None:
    """Our update rule on PyTorch's own modules, the generator's skips once per clip."""
    plain = rewritten(trainer.model)
    for name, child in plain.named_children():
        setattr(trainer.model, name, child)
    for name, child in list(trainer.discriminators.named_children()):
        setattr(trainer.discriminators, name, plain_copy(child))
    for module in trainer.modules.values():
        lay_out(module.to(DEVICE), DEVICE)


def losses(step: Callable[[Batch, int], dict[str, Tensor]], batch: Batch) -> list[Tensor]:
    """Every loss of a first step, and of one after it, which the first update shows in."""
    terms = [step(batch, seed) for seed in (0, 1)]
    return [
        value.detach()
        for step_terms in terms
        for name, value in sorted((name.removeprefix("loss/"), v) for name, v in step_terms.items())
    ]


def random_batch(config: TrainConfig, clips: int, frames: int) -> Batch:
    """Noise of a batch's shape, as a loader's batch lies on the device."""
    rng = torch.Generator().manual_seed(1)
    m = config.model
    video = torch.randint(256, (clips, frames, 3, m.height, m.width), generator=rng).byte()
    audio = torch.rand(clips, frames * m.samples_per_frame, generator=rng) * 2 - 1
    return to_device({"frames": video, "still": video[:, 0], "audio": audio}, DEVICE)


def test_model(comparison: Comparison, run: str, variant: str, replay) -> None:
    replay(comparison, run, variant, seconds=1.0)
