"""Text encoders of transformers: BERT, RoBERTa and their kin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from randlora.bounds import Share
from randlora.models.base import Backbone
from randlora.models.pretrained import Pretrained, named_outputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TextEncoder(Pretrained):
    """A text encoder, and what its classifier is like.

    Args:
        pooling: features are the first token's state (``first``) or the mean over the text's tokens (``mean``).
        head_hidden: puts a hidden layer with tanh before the classifier, as RobertaForSequenceClassification does.
        head_dropout: before the classifier's linear maps, as a probability.
    """

    kind: ClassVar[str] = "text"

    pooling: Literal["first", "mean"] = "first"
    head_hidden: bool = False
    head_dropout: Share = 0.1

    def _with_head(self, module: Any, head: nn.Module, names: Sequence[str]) -> PreTrainedModel | None:
        """RoBERTa's and MPNet's classifier: a hidden layer with tanh on the first token's state, and a linear map."""
        if self.pooling != "first" or not self.head_hidden or module.config.model_type not in ("roberta", "mpnet"):
            return None
        from transformers.models.auto import modeling_auto

        hidden, last = (layer for layer in head if isinstance(layer, nn.Linear))  # type: ignore[attr-defined]
        cls = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(module.config)]
        whole = cls(named_outputs(module.config, names, last.out_features))
        getattr(whole, module.base_model_prefix).load_state_dict(module.state_dict())
        whole.classifier.dense.load_state_dict(hidden.state_dict())
        whole.classifier.out_proj.load_state_dict(last.state_dict())
        return whole.to(module.dtype)

    def _backbone(self, module: Any) -> Backbone:
        return Backbone(
            module=module,
            kind=self.kind,
            width=module.config.hidden_size,
            tokenizer=self.tokenizer,
            features=partial(_pooled, self.pooling),
            head_hidden=self.head_hidden,
            head_dropout=self.head_dropout,
        )


def _pooled(pooling: str, module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """(B, width) from input_ids, attention_mask and, where the model has them, token_type_ids, each (B, length)."""
    states = module(**inputs).last_hidden_state
    if pooling == "first":
        return states[:, 0]
    mask = inputs["attention_mask"][..., None].to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1)
