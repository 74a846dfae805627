"""The talking-face system: encoders, fusion, generator and discriminators; and Speech2Vid."""

from model.config import ModelConfig
from model.discriminators import Discriminators
from model.speech2vid import Speech2Vid
from model.talking_face import TalkingFace

__all__ = ["Discriminators", "ModelConfig", "Speech2Vid", "TalkingFace"]
