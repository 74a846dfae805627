"""The training run, from configuration to checkpoint, pictures and video."""

import dataclasses
import sys
import time
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from train.config import TrainConfig
from train.data.batches import (
    StepSampler,
    by_turns,
    make_loader,
    next_batch,
    open_set,
    stop_workers,
)
from train.data.prepared import PreparedSet, read_alignment, read_identity, read_places
from train.device import Batch, clip_to_device, in_interpreter, pick_device, to_device
from train.errors import UserError
from train.metrics.quality import psnr
from train.run.checkpoint import (
    BEST_FILE,
    CHECKPOINT_FILE,
    checkpoints,
    find_checkpoint,
    go_back_to,
    load_encoders,
    load_modules,
    load_optimizers,
    save_checkpoint,
)
from train.run.curves import write_curves
from train.run.directory import (
    MetricsLog,
    claimed,
    how_to_go_on,
    improved,
    stalled,
    write_record,
)
from train.run.lock import locked
from train.run.profile import Profile, check_steps
from train.run.samples import write_comparison, write_grid
from train.run.stopping import stopping, tell
from train.source import find_data
from train.trainer import BaseTrainer, make_trainer
from train.trainer.graph import why_not_recorded
from train.trainer.losses import bottom_half, l1_loss

SAMPLED_CLIPS = 4
#: PSNR, dB, of a validation clip that is reproduced exactly: infinity would spoil the mean.
BEST_PSNR = 100.0


def train(config: TrainConfig) -> Path:
    """Run or resume a training; return the run directory.

    Raises :class:`UserError` for bad settings or data before anything is
    written, for a run that another process trains, and for a loss that is not finite (the last
    good checkpoint stays). SIGINT, SIGTERM and SIGHUP end it with ``SystemExit`` after the running
    step, once that is saved.
    """
    with ExitStack() as held:
        return _train(config, held)


def _train(config: TrainConfig, held: ExitStack) -> Path:
    if config.resume:
        held.enter_context(locked(config.resume))
    device = pick_device(config.device)
    if in_interpreter(config.kernels, device):
        torch.set_num_threads(1)  # Python's thread is the busy one; others would spin beside it
    torch.backends.cudnn.benchmark = True  # on a GPU; every step has the same sizes
    not_recorded = why_not_recorded(config, device)
    root = find_data(config)
    config = identify(config.located(), root)
    trainer = make_trainer(config, device)
    clips = open_set(
        root,
        "train",
        config.model,
        frames=config.frames,
        seed=config.seed,
        random_crop=True,
        mirror=config.mirror,
        limit=config.limit,
        any_still=config.any_still,
        augment=config.augment,
        context=trainer.model.context,
        eyes=config.model.eyes,
        lips=config.model.lips,
    )
    validation = open_validation(config, root)
    if config.encoders != "joint":
        if not (config.resume and (config.resume / CHECKPOINT_FILE).exists()):  # which has them too
            load_encoders(trainer.model, Path(config.encoders))
        trainer.model.freeze_encoders()
    trainer.make_optimizers()
    if not_recorded is None:
        trainer.record(must=config.graph == "on")
    start = resume(trainer, config.resume) if config.resume else 0
    if start >= config.steps:
        raise UserError(
            f"{config.resume}: already at step {start} of {config.steps}; "
            f"go further with --steps {2 * start}"
        )
    if start and stalled(config.resume, config.patience, start):  # type: ignore[arg-type]
        raise UserError(
            f"{config.resume}: stopped at step {start}, after {config.patience} validations "
            "without a better PSNR; go on with --patience 0"
        )

    if config.profile:
        check_steps(config.steps - start)
    stop = held.enter_context(stopping())
    run = config.resume or held.enter_context(claimed(config))
    write_record(run, config, device)
    announce(config, trainer, clips, validation, run, device, not_recorded)
    log = MetricsLog(run, start)
    speakers = [clip["speaker"] for clip in clips.clips]
    sampler = StepSampler(
        speakers, config.batch_size, config.seed, start, config.steps, config.balance
    )
    loader = make_loader(clips, sampler, config.workers, pin=device.type == "cuda")

    profile = Profile(trainer, run, config.steps - start) if config.profile else None
    finite = torch.ones((), dtype=torch.bool, device=device)
    saved, waited, began = start, 0.0, time.perf_counter()
    bar = tqdm(total=config.steps, initial=start, unit="step", dynamic_ncols=True)
    batches = iter(loader)
    try:
        for step in range(start + 1, config.steps + 1):
            with profile.step() if profile else nullcontext():
                fetched = time.perf_counter()
                with trainer.section("data wait"):
                    item = next_batch(batches)
                waited += time.perf_counter() - fetched
                with trainer.section("host to device"):
                    batch = to_device(item, device, clips.context)
                trainer.anneal((step - 1) / config.steps)
                rng = torch.Generator().manual_seed(config.seed + 7919 * step)
                torch.manual_seed(config.seed + 7919 * step + 1)  # for dropout and other voices
                terms = trainer.step(batch, rng)
                trainer.update_average(step)
                finite &= torch.stack(list(terms.values())).isfinite().all()
                if not stop.code:  # who shows the bar may have had the same signal, and be gone
                    bar.update()

                last = step == config.steps
                if step == start + 1 or step % config.log_every == 0 or last:
                    with trainer.section("logging"):
                        check_finite(finite, terms, step, saved, run)
                        values = torch.stack(list(terms.values())).tolist()
                        metrics = dict(zip(terms, values, strict=True))
                        seconds = time.perf_counter() - began
                        metrics["speed/clips_per_s"] = (step - start) * config.batch_size / seconds
                        metrics["speed/data_wait_share"] = waited / seconds
                        log.write(step, metrics)
                        bar.set_postfix_str(f"l1 {metrics['loss/l1']:.4f}", refresh=not stop.code)
            pairs = []
            if step % config.validate_every == 0 or last:
                pairs = generate(trainer, validation, len(validation))
                found = validate(pairs)
                measured = {name: torch.tensor(value) for name, value in found.items()}
                finite &= torch.stack([v.isfinite() for v in measured.values()]).all().to(device)
                check_finite(finite, terms | measured, step, saved, run)
                log.write(step, found)
                if improved(run, step):
                    save_best(trainer, run, step)
                last = last or stalled(run, config.patience, step)
            if step % config.sample_every == 0 or last:
                pairs = pairs or generate(trainer, validation, SAMPLED_CLIPS)
                write_samples(pairs, validation, run / "samples", f"step_{step:06d}")
            if step % config.checkpoint_every == 0 or last or stop.code:
                check_finite(finite, terms, step, saved, run)
                save(trainer, run, step)
                saved = step
            if last or stop.code:
                break
    finally:
        stop_workers(batches)
        with suppress(OSError):
            bar.close()
        log.close()
    curves = write_curves(run) if last else None
    if stop.code:
        further = "that was the last" if last else f"go on with: {how_to_go_on(run)}"
        tell(f"stopped at step {step} of {config.steps}, saved in {run}; {further}")
        sys.exit(stop.code)
    early = f" at step {step} of {config.steps}, no better PSNR" if step < config.steps else ""
    print(f"\ndone{early}: {run}\n  checkpoint  {run / CHECKPOINT_FILE}")
    if (run / BEST_FILE).exists():
        print(f"  best        {run / BEST_FILE}")
    print(f"  pictures    {run / 'samples'}/step_{step:06d}.png")
    print(f"  video       {run / 'samples'}/step_{step:06d}.mp4")
    print(f"  curves      {curves}")
    return run


def identify(config: TrainConfig, root: Path) -> TrainConfig:
    """Note what the set at ``root`` is; :class:`UserError` if a run began with another."""
    hint = f"if the data of {config.resume} has moved, say where it is: --data DIRECTORY"
    found = read_identity(root, hint) if config.resume else read_identity(root)
    if config.resume and config.data_identity not in ("", found):
        raise UserError(
            f"--data {root}: not the set that {config.resume} was trained on (other clips, splits "
            "or settings); give that one, or start a new run with another --out"
        )
    return dataclasses.replace(
        config, alignment=read_alignment(root), places=read_places(root), data_identity=found
    )


def open_validation(config: TrainConfig, root: Path) -> PreparedSet:
    """The fixed validation clips: whole, from the start, without mirroring."""
    options = {"limit": config.limit} if config.validation_split == "train" else {}
    data = open_set(root, config.validation_split, config.model, **options)
    return by_turns(data, config.validation_clips)


def resume(trainer: BaseTrainer, run: Path) -> int:
    """Load the run's last good checkpoint; return its step, 0 if it was killed before the first."""
    if not checkpoints(run):
        print(f"{run}: no checkpoint yet, so the run starts again at step 0", flush=True)
        return 0
    file, tensors, info = find_checkpoint(run)
    load_modules(trainer.modules, tensors, run)
    load_optimizers(trainer.optimizers, tensors, info, run)
    go_back_to(file)
    return int(info["step"])


def save(trainer: BaseTrainer, run: Path, step: int) -> None:
    """Write the checkpoint of ``step``."""
    info = {"step": step, "config": trainer.config.to_dict()}
    path, keep = run / CHECKPOINT_FILE, trainer.config.keep
    save_checkpoint(path, trainer.modules, trainer.optimizers, info, keep)


def save_best(trainer: BaseTrainer, run: Path, step: int) -> None:
    """Write the model of ``step``, which did best so far."""
    kept = {k: part for k, part in trainer.modules.items() if k in ("model", "average")}
    save_checkpoint(run / BEST_FILE, kept, {}, {"step": step, "config": trainer.config.to_dict()})


def check_finite(
    finite: Tensor, terms: dict[str, Tensor], step: int, saved: int, run: Path
) -> None:
    """Raise :class:`UserError` if any loss since the last check was NaN or infinite."""
    if finite.item():
        return
    bad = [name for name, value in terms.items() if not value.isfinite()] or ["a loss"]
    kept = f"the checkpoint of step {saved} stays in {run}" if saved else "no checkpoint yet"
    raise UserError(
        f"{', '.join(bad)} is not finite at step {step}; {kept}; go on with: {how_to_go_on(run)} "
        "(if it comes again at this step, the machine is not to blame, and other settings may "
        "help: --precision fp32, smaller --lr-generator and --lr-frame)"
    )


@torch.no_grad()
def generate(trainer: BaseTrainer, data: PreparedSet, count: int) -> list[tuple[Batch, Tensor]]:
    """The first ``count`` clips, one by one, with what the model makes of them (fixed noise)."""
    model = trainer.average.eval()
    pairs = []
    for index in range(min(count, len(data))):
        batch = clip_to_device(data[index], trainer.device)
        with trainer.autocast:
            rng = torch.Generator().manual_seed(index)
            generated = model(batch.still, batch.audio, rng).float()
        pairs.append((batch, generated))
    model.train(model is trainer.model)
    return pairs


def validate(pairs: list[tuple[Batch, Tensor]]) -> dict[str, float]:
    """Mean L1 and PSNR (whole frame and bottom half) over the pairs of :func:`generate`."""
    found = []
    for batch, generated in pairs:
        bottom = bottom_half(generated), bottom_half(batch.frames)
        ratios = [
            psnr(made, real, colour=True).clamp_max(BEST_PSNR).mean()
            for made, real in ((generated, batch.frames), bottom)
        ]
        found.append(torch.stack([l1_loss(*bottom).double(), *ratios]))
    names = ("val/l1", "val/psnr", "val/psnr_bottom")
    return dict(zip(names, torch.stack(found).mean(0).tolist(), strict=True))


def write_samples(
    pairs: list[tuple[Batch, Tensor]], data: PreparedSet, folder: Path, name: str
) -> None:
    """Write the picture grid and the video of the first few pairs of :func:`generate`."""
    folder.mkdir(exist_ok=True)
    pairs = pairs[:SAMPLED_CLIPS]
    length = min(generated.shape[1] for _, generated in pairs)
    real = torch.cat([batch.frames[:, :length] for batch, _ in pairs])
    made = torch.cat([generated[:, :length] for _, generated in pairs])
    audio = torch.cat([batch.audio[:, : length * data.window_stride] for batch, _ in pairs])
    write_grid(folder / f"{name}.png", real, made)
    write_comparison(folder / f"{name}.mp4", real, made, audio, data.fps, data.sample_rate)


def announce(
    config: TrainConfig,
    trainer: BaseTrainer,
    clips: PreparedSet,
    validation: PreparedSet,
    run: Path,
    device: torch.device,
    not_recorded: str | None,
) -> None:
    """The first lines of output: what was chosen."""
    size = config.model
    count = sum(p.numel() for p in trainer.model.parameters())
    left_out = f", {clips.skipped} too short left out" if clips.skipped else ""
    interpreter = " (interpreted; discriminators eager)"
    kernels = config.kernels + interpreter * in_interpreter(config.kernels, device)
    precision = "bf16 autocast" if trainer.autocast._enabled else "fp32"
    ours = config.system == "polyfusion"
    name = f"fusion {config.fusion}" if ours else "Speech2Vid"
    launched = f"in pieces ({not_recorded})" if not_recorded else "recorded in a CUDA graph"
    again = getattr(trainer, "recompute", False)
    activations = f"activations {'made again' if again else 'kept'} for the backward"
    print(
        f"polyfusion  {config.preset} preset, {name}, kernels {kernels}, "
        f"{device} {precision}\n"
        f"  model     {count / 1e6:.2f} M parameters, frames {size.height}×{size.width}"
        f"{f', encoders {config.encoders}' if ours else ''}\n"
        f"  data      {clips.root}: {len(clips)} clips of {len(clips.speakers)} speakers{left_out},"
        f" {len(validation)} to validate ({config.validation_split})\n"
        f"  training  {config.steps} steps of {config.batch_size} clips × {config.frames} frames\n"
        f"  step      {launched}; {activations}\n"
        f"  run       {run}",
        flush=True,
    )
