"""The rows of Table 1: what each trains, and what the paper reports for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from train.config import TrainConfig


@dataclass(frozen=True)
class TableRow:
    """A row of the table: its title, and how its configuration differs from the others'.

    ``loss`` and ``model`` hold the differences of these parts of the configuration. ``pretrained``
    says that the row starts from the frozen encoders of the pretraining run.
    """

    title: str
    options: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = True

    def configure(self, base: TrainConfig) -> TrainConfig:
        """``base`` with this row's differences."""
        return dataclasses.replace(
            base,
            **self.options,
            loss=dataclasses.replace(base.loss, **self.loss),
            model=dataclasses.replace(base.model, **self.model),
        )


#: The paper's rows, in its order.
PAPER_ROWS = {
    "tucker": TableRow("PF-Tucker", {"fusion": "tucker"}),
    "cp": TableRow("PF-CP", {"fusion": "cp"}),
    "cmf": TableRow("PF-CMF", {"fusion": "cmf"}),
    "cmf-sr": TableRow("PF-CMF-SR", {"fusion": "cmf-sr"}),
    "concat": TableRow("concat [2]", {"fusion": "concat"}),
    "speech2vid": TableRow("Speech2Vid", {"system": "speech2vid", "patience": 0}, pretrained=False),
}
#: Studies of ours: the forms and the weight of Ω, and the options beyond the paper.
OTHER_ROWS = {
    "cp-norm": TableRow("PF-CP, Ω norm, λ₂ 100", loss={"penalty": "norm", "omega": 100.0}),
    "cp-sumsq": TableRow(
        "PF-CP, Ω sum of squares, λ₂ 100", loss={"penalty": "sumsq", "omega": 100.0}
    ),
    "cp-none": TableRow("PF-CP, no Ω", loss={"penalty": "none"}),
    "dense": TableRow("unfactored (1)", {"fusion": "dense"}),
    "cp-noise-view": TableRow("PF-CP, noise as a third view", model={"fuse_noise": True}),
    "cp-within-view": TableRow("PF-CP, within-view degree 2", model={"within_view_degree": 2}),
    "cp-patch": TableRow("PF-CP, 3-D PatchGAN", model={"sequence_disc": "patch"}),
}
ROWS = PAPER_ROWS | OTHER_ROWS

_COLUMNS = (
    "psnr",
    "ssim",
    "cpbd",
    "acd",
    "av_offset",
    "av_confidence",
    "blinks_per_s",
    "blink_duration",
)
#: Table 1 of the paper, GRID; its ACD is in an embedder and a normalisation of its own.
PAPER_GRID = {
    name: dict(zip(_COLUMNS, values, strict=True))
    for name, values in {
        "tucker": (27.360, 0.831, 0.260, 1.11e-4, 1, 7.1, 0.37, 0.38),
        "cp": (27.619, 0.863, 0.259, 1.18e-4, 1, 7.3, 0.32, 0.36),
        "cmf": (27.529, 0.836, 0.268, 8.63e-5, 1, 7.4, 0.33, 0.36),
        "cmf-sr": (27.608, 0.833, 0.253, 9.74e-5, 1, 7.3, 0.37, 0.32),
        "concat": (27.100, 0.818, 0.268, 1.47e-4, 1, 7.4, 0.45, 0.36),
        "speech2vid": (22.662, 0.720, 0.255, 1.48e-4, 1, 5.3, 0.00, 0.00),
    }.items()
}
