"""Who speaks in the synthetic set: visible traits and the articulation they imply."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from train.data.synthetic.speech import Voice

ARTICULATION = ("jaw", "spread", "round", "asymmetry", "upper_lip", "teeth", "tongue", "protrude")

SKINS = (
    (252, 226, 208),
    (243, 206, 180),
    (229, 180, 146),
    (206, 152, 118),
    (157, 104, 73),
    (108, 70, 51),
)
HAIRS = (
    (32, 26, 26),
    (58, 38, 28),
    (98, 62, 38),
    (150, 98, 52),
    (208, 164, 96),
    (160, 72, 36),
    (176, 172, 170),
)
EYES = ((62, 38, 24), (98, 64, 34), (110, 112, 58), (78, 122, 96), (72, 118, 160), (116, 134, 148))
BACKDROPS = (
    (168, 196, 206),
    (198, 186, 208),
    (214, 198, 172),
    (176, 202, 178),
    (222, 186, 176),
    (150, 170, 200),
    (196, 200, 204),
)
CLOTHES = (
    (70, 92, 128),
    (150, 70, 74),
    (76, 110, 96),
    (120, 96, 136),
    (190, 160, 112),
    (60, 64, 74),
    (214, 208, 196),
)
STYLES = {
    "man": ("bald", "crop", "side", "quiff", "curls"),
    "woman": ("bob", "long", "bangs", "tails", "curls"),
    "child": ("crop", "side", "bob", "bangs", "curls", "tails"),
}


@dataclass(frozen=True)
class Identity:
    """One synthetic speaker. The floats are visible traits in 0..1."""

    kind: str  # man, woman or child
    face_width: float
    jaw: float  # narrow .. square
    nose_width: float
    nose_length: float
    eye_size: float
    eye_spacing: float
    brow_weight: float
    brow_angle: float
    lip_width: float
    lip_fullness: float
    lip_redness: float
    lip_balance: float  # thin upper lip .. thin lower lip
    corner_lift: float  # resting mouth corners: down .. up
    corner_tilt: float  # resting mouth line: lower on the left .. lower on the right
    cheeks: float
    freckles: float
    hairline: float
    skin: np.ndarray  # (3,) RGB
    hair: np.ndarray
    iris: np.ndarray
    backdrop: np.ndarray
    cloth: np.ndarray
    style: str
    beard: str  # none, stubble, moustache or full
    glasses: bool
    voice: Voice
    texture: int  # seed of hair strands and freckles
    quirk: np.ndarray = field(repr=False)  # (8,) small part of the articulation the face hides

    @property
    def half_width(self) -> float:
        """Of the face at its widest, in design pixels."""
        return 31.0 + 4.5 * self.face_width

    @property
    def articulation(self) -> np.ndarray:
        """(8,) float32, in the order of ``ARTICULATION``: how this face turns speech into lip
        shape.

        A smooth function of visible traits, so that it can be read off a still, plus a quirk of
        standard deviation 0.02:

        | entry     | range      | read from                                | multiplies          |
        |-----------|------------|------------------------------------------|---------------------|
        | jaw       | 0.35..1.60 | lip fullness (70 %), lip redness (30 %)  | opening             |
        | spread    | 0.30..1.50 | lip width                                | widening            |
        | round     | 0.00..1.00 | narrowness of the jaw                    | narrowing with jaw  |
        | asymmetry | -1..1      | tilt of the resting mouth line           | skew of the opening |
        | upper_lip | 0.05..0.55 | shortness of the nose                    | upper share of it   |
        | teeth     | 0.00..1.00 | thinness of the upper lip                | visible teeth       |
        | tongue    | 0.00..1.00 | width of the nose                        | visible tongue      |
        | protrude  | 0.00..1.00 | resting mouth corners, 1 at lowest       | rounded thickening  |
        """
        drive = np.array(
            [
                0.35 + 1.25 * (0.7 * self.lip_fullness + 0.3 * self.lip_redness),
                0.30 + 1.20 * self.lip_width,
                1.0 - self.jaw,
                2.0 * self.corner_tilt - 1.0,
                0.05 + 0.50 * (1.0 - self.nose_length),
                1.0 - self.lip_balance,
                self.nose_width,
                1.0 - self.corner_lift,
            ]
        )
        low = np.array([0.35, 0.30, 0.0, -1.0, 0.05, 0.0, 0.0, 0.0])
        high = np.array([1.60, 1.50, 1.0, 1.0, 0.55, 1.0, 1.0, 1.0])
        return np.clip(drive + self.quirk, low, high).astype(np.float32)


_UNIFORM = (
    "face_width",
    "jaw",
    "nose_width",
    "nose_length",
    "eye_size",
    "eye_spacing",
    "brow_weight",
    "brow_angle",
    "lip_width",
    "lip_fullness",
    "lip_redness",
    "lip_balance",
    "corner_lift",
    "corner_tilt",
    "cheeks",
    "hairline",
)


def _mix(a, b, t: float) -> np.ndarray:
    return np.asarray(a, np.float32) * (1 - t) + np.asarray(b, np.float32) * t


def draw_identity(rng: np.random.Generator) -> Identity:
    """Draw a speaker. Traits that set the articulation are uniform; the rest follows the kind."""
    kind = str(rng.choice(["man", "woman", "child"], p=[0.42, 0.42, 0.16]))
    u = {name: float(rng.uniform()) for name in Identity.__dataclass_fields__ if name in _UNIFORM}
    if kind == "child":
        u["eye_size"] = 0.7 + 0.3 * u["eye_size"]
        u["brow_weight"] *= 0.4
    if kind == "woman":
        u["brow_weight"] *= 0.6
    tone = rng.uniform(0, len(SKINS) - 1.001)
    skin = _mix(SKINS[int(tone)], SKINS[int(tone) + 1], tone % 1) + rng.normal(0, 1, 3) * (3, 2, 4)
    dark = tone > 3
    hair = HAIRS[rng.integers(2 if dark else len(HAIRS) - (kind == "child"))]
    iris = EYES[rng.integers(2 if dark else len(EYES))]
    pitch = {"man": (90, 145), "woman": (170, 240), "child": (250, 320)}[kind]
    tract = {"man": (0.96, 1.06), "woman": (1.12, 1.2), "child": (1.25, 1.38)}[kind]
    beards = (
        ("none", "none", "none", "stubble", "moustache", "full") if kind == "man" else ("none",)
    )
    return Identity(
        kind=kind,
        **u,
        freckles=float(rng.uniform(0.4, 1)) if tone < 2 and rng.random() < 0.2 else 0.0,
        skin=np.clip(skin, 0, 255).astype(np.float32),
        hair=np.clip(hair * rng.normal(1, 0.06, 3), 8, 245).astype(np.float32),
        iris=np.asarray(iris, np.float32),
        backdrop=np.clip(
            BACKDROPS[rng.integers(len(BACKDROPS))] + rng.normal(0, 7, 3), 90, 240
        ).astype(np.float32),
        cloth=np.clip(CLOTHES[rng.integers(len(CLOTHES))] + rng.normal(0, 9, 3), 20, 240).astype(
            np.float32
        ),
        style=str(rng.choice(STYLES[kind])),
        beard=str(rng.choice(beards)),
        glasses=bool(rng.random() < 0.14),
        voice=Voice(
            rng.uniform(*pitch), rng.uniform(*tract), rng.uniform(), rng.uniform(0.9, 1.05)
        ),
        texture=int(rng.integers(2**31)),
        quirk=rng.normal(0, 0.02, len(ARTICULATION)),
    )
