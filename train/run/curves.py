"""The learning curves of a run as a picture: python -m train.run.curves RUN."""

import sys
from pathlib import Path

from train.files import replacing
from train.run.directory import read_metrics

PANELS = {
    "L1, bottom half": ("loss/l1", "val/l1"),
    "PSNR, dB": ("val/psnr", "val/psnr_bottom"),
    "generator, adversarial": ("loss/g_frame", "loss/g_sequence", "loss/g_sync"),
    "discriminators": ("loss/d_frame", "loss/d_sequence", "loss/d_sync"),
}


def write_curves(run: Path) -> Path:
    """Draw RUN/curves.png from RUN/metrics.jsonl; return its path."""
    from matplotlib.figure import Figure  # once a run, and a second to import

    lines = read_metrics(run)
    figure = Figure(figsize=(4 * len(PANELS), 3), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for axis, (title, names) in zip(axes, PANELS.items(), strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8, frameon=False)
    path = run / "curves.png"
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("usage: python -m train.run.curves RUN, a run directory", file=sys.stderr)
        sys.exit(2)
    print(write_curves(Path(sys.argv[1])))
