"""The talking-face system: encoders, fusion, generator and discriminators."""

from model.config import FUSIONS, ModelConfig
from model.discriminators import Discriminators
from model.talking_face import TalkingFace

__all__ = ["FUSIONS", "Discriminators", "ModelConfig", "TalkingFace"]
