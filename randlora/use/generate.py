"""Texts by a language model that a run has trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Gt, Le

from randlora.adapters import merged
from randlora.bounds import Bounded, Count, NotNegative, Seed
from randlora.data.texts import pad_inputs
from randlora.errors import SettingsError
from randlora.training.evaluate import to_device
from randlora.training.precision import attention_rule, autocast
from randlora.use.trained import Trained


@dataclass(frozen=True)
class Generation(Bounded):
    """How texts are written.

    Args:
        max_new_tokens: The most tokens of a text.
        beams: Of a beam search; 1 takes the likeliest token each time.
        temperature: Above 0, tokens are drawn at random, likelier ones oftener the lower it is.
        top_p: Drawn from the likeliest tokens that have this probability together.
        seed: Of what is drawn.
    """

    max_new_tokens: Count = 128
    beams: Count = 1
    temperature: NotNegative = 0.0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature and self.beams > 1:
            raise SettingsError(f"beams={self.beams} and temperature={self.temperature:g}: give one of them")
        if self.top_p < 1 and not self.temperature:
            raise SettingsError(f"top_p={self.top_p:g} is for random texts: give a temperature too")


def generate(
    trained: Trained,
    prompts: Sequence[str],
    settings: Generation | None = None,
    batch_size: int = 8,
    special_tokens: bool = True,
) -> Iterator[str]:
    """What the model writes after each prompt, in order.

    Args:
        trained: A causal language model.
        prompts: Texts as the model reads them.
        settings: How it writes.
        batch_size: Prompts at a time, padded on the left.
        special_tokens: Whether the tokenizer adds its own, such as one that begins a text; a chat template has them.

    Raises:
        SettingsError: The run's model writes no texts, or a prompt is empty.
    """
    settings = settings or Generation()
    if trained.backbone.kind != "causal_lm" or trained.bound.head is not None:
        raise SettingsError(f"{trained.experiment.model.name} with task {trained.experiment.task.name} writes no texts")
    assert trained.backbone.tokenizer is not None
    tokenizer, model = trained.backbone.tokenizer(), trained.backbone.module
    items = [tokenizer(prompt, add_special_tokens=special_tokens) for prompt in prompts]
    for prompt, item in zip(prompts, items, strict=True):
        if not item["input_ids"]:
            raise SettingsError(f"prompt {prompt!r}: there is nothing to go on from; write at least a word")
    trainer = trained.experiment.trainer
    device = trainer.accelerator().device
    model.to(device).eval()
    drawn = {"temperature": settings.temperature, "top_p": settings.top_p} if settings.temperature else {}
    torch.manual_seed(settings.seed)
    rules = attention_rule(device.type, trainer.precision), autocast(device.type, trainer.precision)
    with merged(model), rules[0], rules[1], torch.no_grad():  # as the run was scored
        for start in range(0, len(items), batch_size):
            inputs: dict[str, Any] = pad_inputs(items[start : start + batch_size], tokenizer.pad_token_id, "left")
            ids = model.generate(
                **to_device(inputs, device), max_new_tokens=settings.max_new_tokens, num_beams=settings.beams,
                do_sample=bool(drawn), pad_token_id=tokenizer.pad_token_id, **drawn,
            )  # fmt: skip
            yield from tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def chat_prompt(trained: Trained, messages: Sequence[dict[str, str]]) -> str:
    """A conversation as the tokenizer's chat template has it; SettingsError where there is none."""
    assert trained.backbone.tokenizer is not None
    tokenizer = trained.backbone.tokenizer()
    if not tokenizer.chat_template:
        raise SettingsError(f"{trained.experiment.model.name}: its tokenizer has no chat template; give --prompt")
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
