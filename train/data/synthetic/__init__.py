"""The built-in set: procedural talking heads, whose movement is known exactly."""

from train.data.synthetic.clip import (
    OPENING,
    articulate,
    draw_blinks,
    eyelids,
    render_clip,
    speaker_identity,
)

__all__ = ["OPENING", "articulate", "draw_blinks", "eyelids", "render_clip", "speaker_identity"]
