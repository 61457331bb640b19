"""Causal language models of transformers: LLaMA and its kin, Qwen2, Phi-3, GPT-2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from randlora.models.base import Backbone
from randlora.models.pretrained import Pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CausalLM(Pretrained):
    """The model with its language-model head. Features, for tasks that classify, are the last token's state."""

    kind: ClassVar[str] = "causal_lm"
    mapping: ClassVar[str] = "MODEL_FOR_CAUSAL_LM_MAPPING"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = super().tokenizer()
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
        return tokenizer

    def _backbone(self, module: Any) -> Backbone:
        return Backbone(
            module=module,
            kind=self.kind,
            width=module.config.hidden_size,
            tokenizer=self.tokenizer,
            features=_last_token,
        )


def _last_token(module: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(B, width): the state of each text's last token, padding on either side."""
    states = module.base_model(**inputs, use_cache=False).last_hidden_state
    positions = torch.arange(states.shape[1], device=states.device)
    last = (positions * inputs["attention_mask"]).argmax(1)
    return states[torch.arange(len(states), device=states.device), last]
