"""Tokenizers and a language model small enough to compute by hand with."""

import torch

from randlora.models import CausalLM
from randlora.models.base import Backbone

WORDS = ["<pad>", "</s>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n#:.,?!/|'\""]


class Letters:
    """A tokenizer of single characters."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(self, text: str, second: str = "", **options) -> dict:  # type: ignore[no-untyped-def]
        ids = [WORDS.index(letter) for letter in text + second][: options.get("max_length")]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def batch_decode(self, rows, skip_special_tokens: bool = True) -> list[str]:  # type: ignore[no-untyped-def]
        return ["".join(WORDS[i] for i in row.tolist() if i > 1) for row in rows]


def real_tokenizer(chat_template: str | None = None):  # type: ignore[no-untyped-def]
    """The same letters as a tokenizer of transformers, which begins a text with </s>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", chat_template=chat_template,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def llama() -> Backbone:
    """A random LLaMA over letters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    backbone = CausalLM("letters")._backbone(LlamaForCausalLM(config).eval())
    backbone.tokenizer = Letters
    return backbone
