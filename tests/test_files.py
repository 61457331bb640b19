"""Adapter files: small, complete, and refused with a reason when they do not fit."""

import json
import os
import random
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import randlora
from conftest import TOY_TARGETS, Toy
from randlora.adapters import adaptation_of, files
from randlora.adapters.interface import method_from
from randlora.bases import distributions
from randlora.errors import SettingsError
from randlora.integrity import MANIFEST, seal
from randlora.methods import FullFineTuning, LoRA, RandLoRA


def first_toy() -> Toy:
    """The model of the fixture `toy` again."""
    torch.manual_seed(0)
    return Toy()


def state_of(model: nn.Module) -> tuple:
    """All that loading could change: which modules and parameters there are, what is trained, every bit."""
    return (
        adaptation_of(model),
        [(name, id(module)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.detach().numpy().tobytes()) for name, p in model.named_parameters()],
    )


@pytest.fixture
def folder(toy: Toy, tmp_path: Path) -> Path:
    randlora.adapt(toy, RandLoRA(rank=4), TOY_TARGETS, seed=5)
    randlora.save_adapter(toy, tmp_path)
    return tmp_path


def seal_again(folder: Path) -> None:
    """So that what is wrong is not the checksum."""
    seal(folder, [path.name for path in folder.iterdir() if path.name != MANIFEST])


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    seal_again(folder)


def replace(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "adapter.safetensors"
    save_file(load_file(path) | tensors, path)
    seal_again(folder)


def test_a_model_with_another_site_of_the_same_shape_is_refused(tmp_path: Path) -> None:
    """As many sites, of the same shapes and so the same tensors, under another name."""
    for name in ("first", "second"):
        model = nn.ModuleDict({name: nn.Linear(6, 6)})
        randlora.adapt(model, LoRA(rank=2), ["*"])
        randlora.save_adapter(model, tmp_path / name)
    with pytest.raises(SettingsError, match="made for 1 sites of other names or shapes"):
        randlora.load_adapter(nn.ModuleDict({"first": nn.Linear(6, 6)}), tmp_path / "second", base="any")


def test_a_file_is_the_trained_parameters_and_under_4_kb(toy: Toy, tmp_path: Path) -> None:
    report = randlora.adapt(toy, RandLoRA(rank=4), TOY_TARGETS)
    size = randlora.save_adapter(toy, tmp_path)
    assert size == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size - 4 * report.trainable_parameters < 4096


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "adapter.json").unlink(), "no adapter can be read"),
        (lambda f: (f / "adapter.json").write_text("{"), "no adapter can be read"),
        (lambda f: (f / "adapter.safetensors").write_bytes(b"\x80\x04pickle"), "no adapter can be read"),
        (lambda f: edit(f, format=99), "format 99"),
        (lambda f: edit(f, sites_sha256="0"), "other names or shapes"),
        (lambda f: edit(f, bases_sha256={}), "bases drawn here differ"),
        (lambda f: edit(f, targets=["nowhere"]), "matches no linear map"),
        (lambda f: edit(f, method={"class": "os:system"}), "unknown method os:system"),
        (lambda f: replace(f, gamma=torch.zeros(3)), "the method needs"),
        (lambda f: replace(f, more=torch.zeros(3)), r"has more as F32 \(3,\), and the method needs None"),
        (lambda f: replace(f, gamma=load_file(f / "adapter.safetensors")["gamma"].half()), "has gamma as F16"),
        (lambda f: replace(f, gamma=load_file(f / "adapter.safetensors")["gamma"] / 0), "values that are not finite"),
        (lambda f: edit(f, targets=3), "targets=3, which is no list"),
        (lambda f: edit(f, method={"class": "randlora.methods.lora:LoRA", "depth": 3}), "method cannot be built"),
        (lambda f: edit(f, base={"float32": "?"}), "fingerprint that cannot be read"),
        (lambda f: edit(f, modules=["head"]), "has the module head too, and this model has none of that name"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_stays(folder: Path, break_it, message: str) -> None:  # type: ignore[no-untyped-def]
    break_it(folder)
    model = first_toy()
    model.norm.requires_grad_(False)
    before = state_of(model)
    with pytest.raises(SettingsError, match=message):
        randlora.load_adapter(model, folder)
    assert state_of(model) == before


def test_another_layout_of_bases_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions, "LAYOUT", distributions.LAYOUT + 1)
    with pytest.raises(SettingsError, match="bases drawn here differ"):
        randlora.load_adapter(Toy(), folder)


def test_the_seed_travels_with_the_file(folder: Path) -> None:
    model = first_toy()
    randlora.load_adapter(model, folder)
    assert adaptation_of(model).seed == 5  # type: ignore[union-attr]


@dataclass(frozen=True)
class Mine(LoRA):
    """A method that a user wrote."""


def test_a_users_method_loads_where_it_is_imported(tmp_path: Path) -> None:
    model, other = first_toy(), first_toy()
    randlora.adapt(model, Mine(rank=2), ["square"])
    randlora.save_adapter(model, tmp_path)
    randlora.load_adapter(other, tmp_path)
    assert isinstance(adaptation_of(other).method, Mine)  # type: ignore[union-attr]


@pytest.mark.parametrize("path", ["randlora.methods.nowhere:LoRA", "randlora.methods.lora:Nothing", "os:system", ""])
def test_a_class_that_is_no_method_is_refused(path: str, folder: Path) -> None:
    settings = json.loads((folder / "adapter.json").read_text())
    settings["method"]["class"] = path
    (folder / "adapter.json").write_text(json.dumps(settings))
    seal_again(folder)
    with pytest.raises(SettingsError, match="unknown method"):
        randlora.load_adapter(Toy(), folder)


def test_a_description_without_a_class_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"^unknown method : import the module that defines it first$"):
        method_from({"rank": 2})


def test_an_adapter_makes_its_folders_and_reads_like_a_text(toy: Toy, tmp_path: Path) -> None:
    randlora.adapt(toy, LoRA(rank=2), ["square"])
    randlora.save_adapter(toy, tmp_path / "new" / "folder")
    lines = (tmp_path / "new" / "folder" / "adapter.json").read_text().split("\n")
    assert lines[:2] == ["{", ' "format": 2,']
    assert lines[-2:] == ["}", ""]


def test_trained_parameters_are_kept_per_name_in_site_order(toy: Toy, tmp_path: Path) -> None:
    randlora.adapt(toy, LoRA(rank=2), ["square", "tall"])
    randlora.save_adapter(toy, tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    expected = torch.cat([toy.square.updates[0].A.flatten(), toy.tall.updates[0].A.flatten()])
    torch.testing.assert_close(tensors["A"], expected)


def with_head() -> tuple[Toy, nn.Linear]:
    model = first_toy()
    model.head = nn.Linear(24, 3)
    return model, model.head


@pytest.fixture
def headed(tmp_path: Path) -> Path:
    """An adapter with a head, and trained values that no start has."""
    model, head = with_head()
    randlora.adapt(model, RandLoRA(rank=4), TOY_TARGETS, seed=5)
    for parameter in (*adaptation_of(model).trained().values(), *head.parameters()):  # type: ignore[union-attr]
        nn.init.normal_(parameter)
    randlora.save_adapter(model, tmp_path / "adapter", {"head": head})
    return tmp_path / "adapter"


HEADED = ("adapter.json", "adapter.safetensors", "head.safetensors", MANIFEST)


def test_any_flipped_bit_is_named_and_the_model_stays(headed: Path) -> None:
    rng, (model, _) = random.Random(0), with_head()
    before = state_of(model)
    for i in range(200):
        path = headed / HEADED[i % 4]
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(SettingsError, match=f"{path.name} is damaged"):
            randlora.load_adapter(model, headed)
        path.write_bytes(content)
    assert state_of(model) == before
    randlora.load_adapter(model, headed)


@pytest.mark.parametrize("name", HEADED)
def test_cut_lost_and_exchanged_files_are_named(headed: Path, name: str) -> None:
    model, _ = with_head()
    before, path = state_of(model), headed / name
    content = path.read_bytes()
    exchanged = (headed / HEADED[HEADED.index(name) - 1]).read_bytes()
    for other in (content[:-1], content[: len(content) // 2], b"", exchanged):
        path.write_bytes(other)
        with pytest.raises(SettingsError, match=f"{name} is damaged"):
            randlora.load_adapter(model, headed)
    path.unlink()
    with pytest.raises(SettingsError, match=f"{name} is missing"):
        randlora.load_adapter(model, headed)
    assert state_of(model) == before


def test_heads_travel(headed: Path, tmp_path: Path) -> None:
    """Under the model's own name by themselves, elsewhere where they are given, and only whole."""
    stored = load_file(headed / "head.safetensors")
    model, head = with_head()
    randlora.load_adapter(model, headed)
    assert {f"head.{name}": tensor for name, tensor in head.state_dict().items()}.keys() == stored.keys()
    assert all(torch.equal(stored[f"head.{name}"], tensor) for name, tensor in head.state_dict().items())

    elsewhere, headless = nn.Linear(24, 3), first_toy()
    randlora.load_adapter(headless, headed, modules={"head": elsewhere})
    assert torch.equal(elsewhere.weight, head.weight)
    narrow, model = nn.Linear(24, 2), first_toy()
    before = state_of(model)
    with pytest.raises(SettingsError, match=r"has head.bias as F32 \(3,\), and these modules need F32 \(2,\)"):
        randlora.load_adapter(model, headed, modules={"head": narrow})
    assert state_of(model) == before
    randlora.load_adapter(model, headed, modules={})
    randlora.save_adapter(model, headed)
    assert sorted(path.name for path in headed.iterdir()) == ["adapter.json", "adapter.safetensors", MANIFEST]


def saved(model: nn.Module, folder: Path, whole: bool = False) -> Path:
    randlora.adapt(model, LoRA(rank=2), ["square", "tall"])
    randlora.save_adapter(model, folder, whole=whole)
    return folder


def test_another_base_of_the_same_shapes_is_refused_unless_any_will_do(tmp_path: Path) -> None:
    saved(first_toy(), tmp_path)
    model = Toy()
    before = state_of(model)
    with pytest.raises(SettingsError, match=r"on another model: of its \d+ frozen tensors .* give base='any'"):
        randlora.load_adapter(model, tmp_path)
    assert state_of(model) == before
    randlora.load_adapter(model, tmp_path, base="any")
    with pytest.raises(SettingsError, match="base='other': choose one of same, any"):
        randlora.load_adapter(Toy(), tmp_path, base="other")


def test_one_other_tensor_is_another_base(tmp_path: Path) -> None:
    """Of those without an update, too."""
    saved(first_toy(), tmp_path)
    model = first_toy()
    with torch.no_grad():
        model.wide.weight *= 1.01
    with pytest.raises(SettingsError, match=r"1 with other values, such as wide.weight, and lacks 0"):
        randlora.load_adapter(model, tmp_path)
    model = first_toy()
    model.norm = nn.Identity()
    with pytest.raises(SettingsError, match=r"0 with other values, and lacks 2"):
        randlora.load_adapter(model, tmp_path)


def test_one_other_value_is_seen_where_all_are_read(tmp_path: Path) -> None:
    saved(first_toy(), tmp_path / "sampled")
    saved(first_toy(), tmp_path / "whole", whole=True)
    model = first_toy()
    with torch.no_grad():
        model.wide.weight.view(-1)[5] += 1  # 5 is no multiple of 1440 // 64 + 1 = 23, modulo 1440, below 64 of them
    assert 5 not in [i * 23 % 1440 for i in range(64)]
    with pytest.raises(SettingsError, match=r"1 with other values, such as wide.weight"):
        randlora.load_adapter(model, tmp_path / "whole")
    randlora.load_adapter(model, tmp_path / "sampled")


def test_heads_and_what_is_trained_are_no_part_of_the_base(headed: Path, tmp_path: Path) -> None:
    """A new head with values of its own, one more module, and norms that full fine-tuning has moved."""
    model, _ = with_head()
    nn.init.normal_(model.head.weight)
    model.more = nn.Linear(3, 3)
    randlora.load_adapter(model, headed)
    full = first_toy()
    randlora.adapt(full, FullFineTuning(train=["norm.*"]), ["square"])
    nn.init.normal_(full.norm.weight)
    randlora.save_adapter(full, tmp_path / "full")
    randlora.load_adapter(first_toy(), tmp_path / "full")


def test_a_base_in_another_precision(tmp_path: Path) -> None:
    """bfloat16 is compared; of float16 nothing can be said but names and shapes."""
    saved(first_toy(), tmp_path / "float32")
    saved(first_toy().bfloat16(), tmp_path / "bfloat16")
    for folder, cast in (("float32", torch.bfloat16), ("bfloat16", torch.float32)):
        randlora.load_adapter(first_toy().to(cast), tmp_path / folder)
        with pytest.raises(SettingsError, match="on another model"):
            randlora.load_adapter(Toy().to(cast), tmp_path / folder)
    with pytest.warns(UserWarning, match="cannot be told: .* another precision, and names and shapes alone agree$"):
        randlora.load_adapter(first_toy().half(), tmp_path / "float32")


def test_a_quantised_base(tmp_path: Path) -> None:
    """Quantised matrices are compared by name and shape, what is not quantised by value."""
    pytest.importorskip("torchao")
    from test_quantization import pair

    quantised, plain = pair()
    targets = ["block.0", "block.2"]
    randlora.adapt(plain, LoRA(rank=2), targets)
    randlora.save_adapter(plain, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        randlora.load_adapter(quantised, tmp_path)
    other, _ = pair()
    with torch.no_grad():
        other.block[0].bias += 1
    with pytest.raises(SettingsError, match=r"1 with other values, such as block.0.base.bias"):
        randlora.load_adapter(other, tmp_path)


def test_a_model_cast_to_bfloat16_gives_a_file_that_is_read(tmp_path: Path) -> None:
    model = first_toy()
    randlora.adapt(model, LoRA(rank=2), ["square", "tall"])
    randlora.save_adapter(model.bfloat16(), tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter.safetensors").values()} == {torch.float32}
    randlora.load_adapter(first_toy(), tmp_path)


def test_an_adapter_of_before_checksums_is_read_with_a_warning(folder: Path) -> None:
    settings = json.loads((folder / "adapter.json").read_text())
    new = {"base", "modules"}
    old = {key: value for key, value in settings.items() if key not in new} | {"format": 1}
    (folder / MANIFEST).unlink()
    with pytest.raises(SettingsError, match=f"{MANIFEST} is missing"):
        randlora.load_adapter(first_toy(), folder)
    (folder / "adapter.json").write_text(json.dumps(old))
    model = Toy()
    with pytest.warns(UserWarning, match="before adapters had .* another base model go unnoticed; save it again$"):
        randlora.load_adapter(model, folder)
    stored = load_file(folder / "adapter.safetensors")["lambda_"]
    trained = adaptation_of(model).trained()  # type: ignore[union-attr]
    assert torch.equal(stored, torch.cat([p.flatten() for name, p in trained.items() if name.endswith("lambda_")]))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_whatever_ends_loading_leaves_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def ends(*arguments: object) -> None:
        raise error

    model = first_toy()
    before = state_of(model)
    monkeypatch.setattr(files, "load_file", ends)
    with pytest.raises(error):
        randlora.load_adapter(model, folder)
    assert state_of(model) == before


def test_a_full_disk_leaves_the_adapter_that_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    model = first_toy()
    randlora.adapt(model, LoRA(rank=2), ["square"])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        randlora.save_adapter(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
