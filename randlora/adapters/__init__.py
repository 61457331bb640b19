"""Where an update sits: the adapted linear, target matching, merge, save and load."""

from randlora.adapters.attention import close_attention, open_attention
from randlora.adapters.core import Adaptation, Report, adapt, adaptation_of, merge, merged, unload
from randlora.adapters.files import load_adapter, save_adapter
from randlora.adapters.seat import AdaptedLinear, Frozen, Site, Update

__all__ = [
    "Adaptation",
    "AdaptedLinear",
    "Frozen",
    "Report",
    "Site",
    "Update",
    "adapt",
    "adaptation_of",
    "close_attention",
    "load_adapter",
    "merge",
    "merged",
    "open_attention",
    "save_adapter",
    "unload",
]
