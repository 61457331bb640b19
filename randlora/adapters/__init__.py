"""Where an update sits: the adapted linear, target matching, merge, save and load, PEFT's format."""

from randlora.adapters.attention import fuse_attention, unfuse_attention
from randlora.adapters.core import Adaptation, Report, adapt, adaptation_of, cached, merge, merged, unload
from randlora.adapters.files import load_adapter, save_adapter
from randlora.adapters.layer import AdaptedLinear, Frozen, Site, Update
from randlora.adapters.peft import from_peft, to_peft

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
    "from_peft",
    "fuse_attention",
    "load_adapter",
    "merge",
    "merged",
    "save_adapter",
    "to_peft",
    "unfuse_attention",
    "unload",
]
