"""PEFT's adapter format, both ways: `adapter_config.json` beside `adapter_model.safetensors`; never a pickle.

LoRA, of one rank or of each site's own, DoRA, VeRA and RandLoRA are exchanged, and every other low-rank update is
written as a LoRA. A site's tensors are named `base_model.model.<module>.<tensor>`; bases that all sites share,
`base_model.vera_A` and so on. RandLoRA's λ is stored (r, n), its A (r, 1, small) and its B (large, n, r), whose columns
come in an order of PEFT's own (see `randlora.bases.peft`). Trained parameters are written as they are and scales where
nothing is trained, so that training goes on alike on both sides; `to_peft` says where that cannot be.
"""

from randlora.peft.reading import from_peft
from randlora.peft.refusals import export_warning, refusal
from randlora.peft.writing import to_peft

__all__ = ["export_warning", "from_peft", "refusal", "to_peft"]
