"""Check, count and time everything on the GPU of this machine, in ten minutes.

python -m bench.gpu --out DIR     DIR/report.md last, DIR/STAGE.json as each stage ends

Stages run one by one in processes of their own, the most telling first, and each has its time; what
is missing on the machine is said and left out. Where there is no GPU, every stage that can runs on
the CPU. Exit code 1: something is wrong; 0: nothing that ran is.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

from bench.gpu.report import report, short
from bench.gpu.stage import Running, Setting, Stage, work

TIME = 590.0
"""Seconds for all stages together."""
_UNTUNED = {"POLYFUSION_AUTOTUNE": "0"}
STAGES = (
    Stage("machine", "What the machine is", "bench.gpu.machine", 40),
    Stage("build", "Build of the CUDA extension", "bench.gpu.building", 200, background=True),
    *(
        Stage(
            f"operators-{kernels}",
            f"Operators against float64: {kernels}",
            "bench.gpu.operators",
            seconds,
            (kernels,),
            lanes,
            after="build" if kernels == "cuda" else "",
            environment=_UNTUNED,
        )
        for kernels, seconds, lanes in (("triton", 120, 6), ("cuda", 50, 4))
    ),
    Stage("capture", "Operators captured in a graph", "bench.gpu.capture", 50, on_cpu=False),
    Stage("step", "A whole step: losses, waits, a graph", "bench.gpu.step", 90),
    Stage("kernels", "Device time against its floor", "bench.gpu.kernels", 70),
    Stage("comparisons", "Comparisons with the peers", "bench.gpu.comparisons", 130),
    Stage("profile", "Where 20 steps go", "bench.gpu.profile", 45),
    Stage("sanitizer", "compute-sanitizer", "bench.gpu.sanitizer", 75, on_cpu=False),
    Stage(
        "operators-eager",
        "Operators against float64: eager",
        "bench.gpu.operators",
        30,
        ("eager",),
        3,
    ),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument(
        "--only", nargs="+", choices=[s.name for s in STAGES], help="stages to run (default: all)"
    )
    parser.add_argument(
        "--seconds", type=float, default=TIME, help=f"for all stages (default: {TIME:.0f})"
    )
    parser.add_argument("--tiny", action="store_true", help="few and small cases, to try the code")
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # in the process of a stage
    parser.add_argument("--lane", nargs=2, type=int, default=(0, 1), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: --out {args.out}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    setting = Setting(_device(), args.tiny, args.out.resolve())
    if args.stage:
        return work(next(s for s in STAGES if s.name == args.stage), setting, *args.lane)
    chosen = [s for s in STAGES if not args.only or s.name in args.only]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run(chosen, setting, args.seconds)
    wrong, path = report(chosen, setting.out)
    print(f"report: {path}")
    return 1 if wrong else 0


def run(chosen: list[Stage], setting: Setting, seconds: float) -> None:
    """Run stages one after the other, those in the background beside the others."""
    end = time.monotonic() + seconds
    running: dict[str, Running] = {}

    def finish(name: str) -> None:
        result = running[name].wait()
        del running[name]
        print(f"[{seconds - end + time.monotonic():4.0f} s] {short(vars(result))}", flush=True)

    try:
        for stage in chosen:
            (setting.out / stage.name).with_suffix(".json").unlink(missing_ok=True)
            if stage.after in running:
                finish(stage.after)
            left = end - time.monotonic()
            if left < 5 or not (setting.on_gpu or stage.on_cpu):
                continue
            running[stage.name] = Running(stage, setting, min(stage.seconds, left))
            if not stage.background:
                finish(stage.name)
        for name in list(running):
            finish(name)
    finally:
        for begun in running.values():
            begun.stop()


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
