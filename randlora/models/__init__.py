"""What is adapted. Constructors are cheap; `load` alone touches disk or network."""

from randlora.models.base import Backbone, Model
from randlora.models.causal_lm import CausalLM
from randlora.models.open_clip import OpenClip, OpenClipVision
from randlora.models.text_encoder import TextEncoder
from randlora.models.timm_transformer import TimmTransformer
from randlora.models.vision_transformer import VisionTransformer

__all__ = [
    "Backbone",
    "CausalLM",
    "Model",
    "OpenClip",
    "OpenClipVision",
    "TextEncoder",
    "TimmTransformer",
    "VisionTransformer",
]
