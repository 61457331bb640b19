"""What an update is: one paper, one file."""

from randlora.adapters.interface import Method
from randlora.methods.dora import DoRA
from randlora.methods.full import FullFineTuning
from randlora.methods.linear_probe import LinearProbe
from randlora.methods.lora import LoRA
from randlora.methods.nola import NoLA
from randlora.methods.randlora import RandLoRA
from randlora.methods.randlora_a import RandLoRAa
from randlora.methods.vera import VeRA

__all__ = ["DoRA", "FullFineTuning", "LinearProbe", "LoRA", "Method", "NoLA", "RandLoRA", "RandLoRAa", "VeRA"]
