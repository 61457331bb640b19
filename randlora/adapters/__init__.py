"""Where an update sits: the adapted linear, target matching, merge, save and load."""

from randlora.adapters.attention import fuse_attention, unfuse_attention
from randlora.adapters.calibration import calibrate
from randlora.adapters.core import Adaptation, Report, adapt, adaptation_of, cached, merge, merged, unload
from randlora.adapters.files import load_adapter, save_adapter
from randlora.adapters.interface import Context, Frozen, Method, Site, Update
from randlora.adapters.layer import AdaptedLinear
from randlora.adapters.several import Adapters

__all__ = [
    "Adaptation",
    "AdaptedLinear",
    "Adapters",
    "Context",
    "Frozen",
    "Method",
    "Report",
    "Site",
    "Update",
    "adapt",
    "adaptation_of",
    "cached",
    "calibrate",
    "fuse_attention",
    "load_adapter",
    "merge",
    "merged",
    "save_adapter",
    "unfuse_attention",
    "unload",
]
