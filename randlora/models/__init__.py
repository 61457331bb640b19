"""What is adapted. Constructors are cheap; `load` alone touches disk or network."""

from randlora.models.base import Backbone, Model
from randlora.models.open_clip import OpenClip

__all__ = ["Backbone", "Model", "OpenClip"]
