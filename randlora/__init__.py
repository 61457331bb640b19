"""Full-rank and low-rank fine-tuning, side by side: RandLoRA and its peers behind one layer and one trainer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from randlora.adapters import Adapters, adapt, calibrate, load_adapter, merge, merged, save_adapter
    from randlora.peft import from_peft, to_peft

__all__ = ["Adapters", "adapt", "calibrate", "from_peft", "load_adapter", "merge", "merged", "save_adapter", "to_peft"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; a typo on the command line should not wait for it.
    if name in ("from_peft", "to_peft"):
        from randlora import peft

        return getattr(peft, name)
    if name in __all__:
        from randlora import adapters

        return getattr(adapters, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
