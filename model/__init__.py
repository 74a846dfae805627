"""The talking-face system: encoders, fusion, generator and discriminators; and Speech2Vid.

:class:`model.animator.Animator` makes photos talk. It reads media as training does, and is found
here without being imported by the networks, which training imports.
"""

from typing import TYPE_CHECKING, Any

from model.config import ModelConfig
from model.discriminators import Discriminators
from model.speech2vid import Speech2Vid
from model.talking_face import TalkingFace

if TYPE_CHECKING:
    from model.animator import Animator

__all__ = ["Animator", "Discriminators", "ModelConfig", "Speech2Vid", "TalkingFace"]


def __getattr__(name: str) -> Any:
    if name == "Animator":
        from model.animator import Animator

        return Animator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
