"""What an update is: one paper, one file."""

from randlora.adapters.interface import Method
from randlora.methods.dora import DoRA
from randlora.methods.edora import EDoRA
from randlora.methods.flat_lora import FlatLoRA
from randlora.methods.full import FullFineTuning
from randlora.methods.gelora import GeLoRA
from randlora.methods.increlora import IncreLoRA
from randlora.methods.linear_probe import LinearProbe
from randlora.methods.lora import LoRA
from randlora.methods.lora_mini import LoRAMini
from randlora.methods.lorta import LoRTA
from randlora.methods.melora import MELoRA
from randlora.methods.mora import MoRA
from randlora.methods.nola import NoLA
from randlora.methods.randlora import RandLoRA
from randlora.methods.randlora_a import RandLoRAa
from randlora.methods.ranked_lora import RankedDoRA, RankedLoRA
from randlora.methods.sora import SoRA
from randlora.methods.vera import VeRA

__all__ = [
    "DoRA",
    "EDoRA",
    "FlatLoRA",
    "FullFineTuning",
    "GeLoRA",
    "IncreLoRA",
    "LinearProbe",
    "LoRA",
    "LoRAMini",
    "LoRTA",
    "MELoRA",
    "Method",
    "MoRA",
    "NoLA",
    "RandLoRA",
    "RandLoRAa",
    "RankedDoRA",
    "RankedLoRA",
    "SoRA",
    "VeRA",
]
