"""The head's loss, against torch's cross-entropy of all logits and transformers' own loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from randlora.adapters import adapt
from randlora.methods import LoRA
from randlora.models.base import Backbone
from randlora.tasks import chunked_cross_entropy as module
from randlora.tasks.chunked_cross_entropy import chunked_cross_entropy
from randlora.tasks.language_model import LanguageModel, learned

WORDS, WIDTH, TOKENS = 23, 8, 17


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", {"cpu": 5 * WORDS})  # the last chunk is shorter than the others


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_loss_and_gradients_are_those_of_all_logits(smoothing: float, bias: bool, trained: bool) -> None:
    """Oracle: torch's cross_entropy and autograd in float64."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, WORDS, bias, dtype=torch.float64).requires_grad_(trained)
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(WORDS, (TOKENS,))
    wanted = [hidden, *(head.parameters() if trained else ())]
    ours = chunked_cross_entropy(hidden, head, targets, smoothing)
    theirs = F.cross_entropy(head(hidden), targets, label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(3 * ours, wanted), torch.autograd.grad(3 * theirs, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(chunked_cross_entropy(hidden, head, targets, smoothing), theirs, rtol=1e-12, atol=0)


def test_autocast_takes_the_products_in_bf16_and_sums_in_float32() -> None:
    """Oracle: torch's cross_entropy of bf16 logits in float32."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, WORDS, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randint(WORDS, (TOKENS,))
    with torch.autocast("cpu", torch.bfloat16):
        ours = chunked_cross_entropy(hidden, head, targets)
        theirs = F.cross_entropy(head(hidden).float(), targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    (a,), (b,) = (torch.autograd.grad(loss, hidden) for loss in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-4)


def test_gradients_under_autocast_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: torch's of all logits at once; a sum of 600 equal numbers in bfloat16 would stop at 256 of them."""
    monkeypatch.setattr(module, "_CHUNK", {"cpu": 1})  # so that a chunk is a token
    torch.manual_seed(0)
    head, hidden, targets = nn.Linear(WIDTH, WORDS), torch.ones(600, WIDTH), torch.zeros(600, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        losses = chunked_cross_entropy(hidden, head, targets), F.cross_entropy(head(hidden).float(), targets)
    ours, theirs = (torch.autograd.grad(loss, [*head.parameters()]) for loss in losses)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-4)


def test_no_tokens_have_no_loss() -> None:
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    loss = chunked_cross_entropy(hidden, nn.Linear(WIDTH, WORDS), torch.zeros(0, dtype=torch.int64))
    assert loss.item() == 0
    loss.backward()


SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(kind: str, **more: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2} if kind == "gpt2" else SIZES
    config = transformers.AutoConfig.for_model(kind, **sizes, **more)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        *((kind, True) for kind in ("gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3")),
        *((kind, False) for kind in ("granite", "cohere", "gemma2")),  # scaled, scaled, capped
    ],
)
def test_every_architecture_has_its_own_loss(kind: str, plain: bool) -> None:
    """Oracle: transformers' loss of the same labels."""
    more = {
        "granite": {"logits_scaling": 3.0},
        "cohere": {"logit_scale": 0.5},
        "gemma2": {"final_logit_softcapping": 0.2},
    }
    lm = tiny(kind, **more.get(kind, {}))
    model = LanguageModel(Backbone(lm, "causal_lm", 16))
    assert model.plain_head is plain
    ids = torch.randint(3, WORDS, (3, 9))
    labels = ids.clone()
    labels[0, :4] = labels[1, 6:] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ours = model(inputs, **learned(labels))
    theirs = lm(**inputs, labels=labels).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    logits = lm(**inputs).logits[:, :-1]
    smooth = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.3)
    torch.testing.assert_close(model(inputs, **learned(ids), smoothing=0.3), smooth, rtol=1e-5, atol=1e-6)
    alone = torch.full_like(ids, -100)
    alone[2, 5] = 7
    one = F.cross_entropy(logits[2, 4], torch.tensor(7))
    torch.testing.assert_close(model(inputs, **learned(alone)), one, rtol=1e-5, atol=1e-6)
    alone[2, 5] = -100
    assert model(inputs, **learned(alone)).item() == 0


def test_an_updated_head_is_asked_for_its_logits() -> None:
    """Oracle: transformers' loss of the merged model."""
    lm = tiny("llama", tie_word_embeddings=False)
    adapt(lm, LoRA(rank=2), ["lm_head"], seed=0)
    trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    for parameter in trained:
        nn.init.normal_(parameter)
    model = LanguageModel(Backbone(lm, "causal_lm", 16))
    assert not model.plain_head
    ids = torch.randint(3, WORDS, (3, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ours = model(inputs, **learned(ids))
    torch.testing.assert_close(ours, lm(**inputs, labels=ids).loss, rtol=1e-5, atol=1e-6)
    ours.backward()
    assert all(parameter.grad is not None for parameter in trained)


def test_one_token_is_its_own_mean() -> None:
    """Oracle: torch's cross_entropy."""
    head, hidden, target = nn.Linear(WIDTH, WORDS), torch.randn(1, WIDTH), torch.tensor([3])
    torch.testing.assert_close(chunked_cross_entropy(hidden, head, target), F.cross_entropy(head(hidden), target))
