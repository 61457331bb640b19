"""Targets: every pattern matches or is refused with what is near; slices; shared weights; nothing half done."""

import pytest
import torch
from torch import nn

import randlora
from conftest import Toy
from randlora.adapters.targets import completed, named_slices, places
from randlora.errors import SettingsError
from randlora.methods import LoRA, RandLoRA


def names(report: randlora.adapters.Report) -> list[str]:
    return [site.name for site in report.sites]


def test_sites_come_in_the_models_order(toy: Toy) -> None:
    assert names(randlora.adapt(toy, LoRA(2), ["wide", "s*", "*.in_proj"])) == ["square", "wide", "attention.in_proj"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["squar"], "matches no linear map; there are square"),
        (["square", "*.q_proj"], r"\*\.q_proj"),
        (["norm"], "matches no linear map"),
        (["c_attn[z]"], r"no slice 'z'; it has c_attn\[q\], c_attn\[k\], c_attn\[v\]"),
        (["square[q]"], "none: it is not a fused matrix"),
        (["c_attn", "c_attn[q]"], "both whole and as"),
        ([], "at least one pattern"),
        (["re:(square"], r"target 're:\(square' is no regular expression: "),
        (["re:squar"], "target 're:squar' matches no linear map"),
        ("square", "give a list"),
    ],
)
def test_wrong_targets_are_refused_and_leave_the_model_alone(toy: Toy, targets: object, message: str) -> None:
    before = [(name, type(module)) for name, module in toy.named_modules()]
    with pytest.raises(SettingsError, match=message):
        randlora.adapt(toy, LoRA(2), targets)  # type: ignore[arg-type]
    assert [(name, type(module)) for name, module in toy.named_modules()] == before
    assert all(parameter.requires_grad for parameter in toy.parameters())


@pytest.mark.parametrize("parts", [["q"], ["k"], ["v"], ["q", "v"]])
def test_rows_beside_a_slice_are_the_bases(toy: Toy, parts: list[str]) -> None:
    x = torch.randn(2, 24)
    before = toy.c_attn(x).chunk(3, -1)
    randlora.adapt(toy, LoRA(2), [f"c_attn[{part}]" for part in parts])
    with torch.no_grad():
        for update in toy.c_attn.updates:
            update.B.normal_()
    after = toy.c_attn(x).chunk(3, -1)
    changed = [not torch.allclose(a, b, atol=1e-6) for a, b in zip(after, before, strict=True)]
    assert changed == [part in parts for part in "qkv"]


def test_targets_as_peft_has_them() -> None:
    """Oracle: what PEFT adapts by the same words (`target_modules`), a regular expression with our prefix."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, num_key_value_heads=1, **size)
    for theirs, ours in (
        ("all-linear", ["all-linear"]),
        (["q_proj", "layers.1.mlp.up_proj"], ["q_proj", "layers.1.mlp.up_proj"]),
        (r".*layers\.[01]\..*[kv]_proj", [r"re:.*layers\.[01]\..*[kv]_proj"]),
    ):
        adapted = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=1, target_modules=theirs))
        expected = [name for name, module in adapted.base_model.model.named_modules() if hasattr(module, "lora_A")]
        report = randlora.adapt(LlamaForCausalLM(config), LoRA(1), ours)
        assert names(report) == expected


def test_a_name_is_the_end_of_one_only_where_none_is_it_as_a_whole() -> None:
    model = nn.ModuleDict({"up": nn.Linear(3, 3), "block": nn.ModuleDict({"up": nn.Linear(3, 3)})})
    assert [place.site for place in places(model, ["up"])] == ["up"]
    del model["up"]
    assert [place.site for place in places(model, ["up"])] == ["block.up"]


def test_a_slice_is_a_site_of_its_own(toy: Toy) -> None:
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    base, weight = toy.double().c_attn(x), toy.c_attn.weight.clone()
    randlora.adapt(toy, RandLoRA(rank=4), ["c_attn[q]", "c_attn[v]"])
    layer = toy.c_attn
    with torch.no_grad():
        for update in layer.updates:
            update.lambda_.normal_()
    change = layer(x) - base
    q, k, v = change.chunk(3, -1)
    assert q.abs().max() > 0.01
    assert v.abs().max() > 0.01
    assert k.abs().max() < 1e-12  # the sums' order may be another
    randlora.merge(toy)
    changed = (toy.c_attn.weight != weight).any(0)  # (in, out)
    assert changed.tolist() == [True] * 24 + [False] * 24 + [True] * 24


def test_grouped_queries_and_fused_mlps_are_cut_by_the_configuration() -> None:
    class Configuration:
        num_attention_heads, num_key_value_heads = 8, 2

    qkv = named_slices("layers.0.qkv_proj", nn.Linear(16, 8 * 4 + 2 * 2 * 4), Configuration())
    assert qkv == {"q": slice(0, 32), "k": slice(32, 40), "v": slice(40, 48)}
    assert named_slices("mlp.gate_up_proj", nn.Linear(16, 20)) == {"gate": slice(0, 10), "up": slice(10, 20)}
    assert named_slices("in_proj", nn.Linear(16, 50)) == {}


def test_the_other_slices_are_completed_by_the_configuration() -> None:
    """Eight heads of queries and two of keys and values, as the model says of itself; others are left alone."""
    model = nn.ModuleDict({"first": nn.Linear(16, 16), "qkv_proj": nn.Linear(16, 48), "c_attn": nn.Linear(16, 48)})
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    model.config = type("Configuration", (), heads)  # type: ignore[assignment]
    chosen = places(model, ["first", "qkv_proj[v]", "c_attn[q]"])
    rows = {place.site: place.rows for place in completed(model, chosen, lambda name: name == "qkv_proj.weight")}
    assert rows == {
        "first": None, "qkv_proj[v]": slice(40, 48), "qkv_proj[q]": slice(0, 32), "qkv_proj[k]": slice(32, 40),
        "c_attn[q]": slice(0, 32),
    }  # fmt: skip
    assert next(iter(rows)) == "first"
    assert list(rows)[-1] == "c_attn[q]"


def test_a_shared_weight_is_refused() -> None:
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False), "body": nn.Linear(4, 4)}
    )
    model["head"].weight = model["embedding"].weight
    with pytest.raises(SettingsError, match="share one weight"):
        randlora.adapt(model, LoRA(2), ["head"])
    assert names(randlora.adapt(model, LoRA(2), ["body"])) == ["body"]


def test_adapting_twice_is_refused(toy: Toy) -> None:
    randlora.adapt(toy, LoRA(2), ["square"])
    with pytest.raises(SettingsError, match="adapted already"):
        randlora.adapt(toy, LoRA(2), ["tall"])
    randlora.merge(toy)
    randlora.adapt(toy, LoRA(2), ["tall"])


def test_merge_and_save_need_an_adapted_model(toy: Toy, tmp_path) -> None:  # type: ignore[no-untyped-def]
    for call in (lambda: randlora.merge(toy), lambda: randlora.save_adapter(toy, tmp_path)):
        with pytest.raises(SettingsError, match="not adapted"):
            call()
