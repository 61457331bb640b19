"""Where an update sits: the adapted linear, target matching, merge, save and load, PEFT's format."""

from randlora.adapters.attention import close_attention, open_attention
from randlora.adapters.core import Adaptation, Report, adapt, adaptation_of, cached, merge, merged, unload
from randlora.adapters.files import load_adapter, save_adapter
from randlora.adapters.peft import from_peft, to_peft
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
    "cached",
    "close_attention",
    "from_peft",
    "load_adapter",
    "merge",
    "merged",
    "open_attention",
    "save_adapter",
    "to_peft",
    "unload",
]
