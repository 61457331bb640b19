"""Adapter files: small, complete, and refused with a reason when they do not fit."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import randlora
from conftest import TOY_TARGETS, Toy
from randlora.adapters import adaptation_of
from randlora.bases import distributions
from randlora.errors import SettingsError
from randlora.methods import LoRA, RandLoRA


@pytest.fixture
def folder(toy: Toy, tmp_path: Path) -> Path:
    randlora.adapt(toy, RandLoRA(rank=4), TOY_TARGETS, seed=5)
    randlora.save_adapter(toy, tmp_path)
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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
        (lambda f: save_file({"gamma": torch.zeros(3)}, f / "adapter.safetensors"), "the method needs"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_stays(folder: Path, break_it, message: str) -> None:  # type: ignore[no-untyped-def]
    break_it(folder)
    model = Toy()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(SettingsError, match=message):
        randlora.load_adapter(model, folder)
    assert adaptation_of(model) is None
    assert [name for name, _ in model.named_modules()] == before


def test_another_layout_of_bases_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions, "LAYOUT", distributions.LAYOUT + 1)
    with pytest.raises(SettingsError, match="bases drawn here differ"):
        randlora.load_adapter(Toy(), folder)


def test_the_seed_travels_with_the_file(folder: Path) -> None:
    model = Toy()
    randlora.load_adapter(model, folder)
    assert adaptation_of(model).seed == 5  # type: ignore[union-attr]


@dataclass(frozen=True)
class Mine(LoRA):
    """A method that a user wrote."""


def test_a_users_method_loads_where_it_is_imported(tmp_path: Path) -> None:
    model, other = Toy(), Toy()
    randlora.adapt(model, Mine(rank=2), ["square"])
    randlora.save_adapter(model, tmp_path)
    randlora.load_adapter(other, tmp_path)
    assert isinstance(adaptation_of(other).method, Mine)  # type: ignore[union-attr]


@pytest.mark.parametrize("path", ["randlora.methods.nowhere:LoRA", "randlora.methods.lora:Nothing", "os:system", ""])
def test_a_class_that_is_no_method_is_refused(path: str, folder: Path) -> None:
    settings = json.loads((folder / "adapter.json").read_text())
    settings["method"]["class"] = path
    (folder / "adapter.json").write_text(json.dumps(settings))
    with pytest.raises(SettingsError, match="unknown method"):
        randlora.load_adapter(Toy(), folder)


def test_trained_parameters_are_kept_per_name_in_site_order(toy: Toy, tmp_path: Path) -> None:
    randlora.adapt(toy, LoRA(rank=2), ["square", "tall"])
    randlora.save_adapter(toy, tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    expected = torch.cat([toy.square.updates[0].A.flatten(), toy.tall.updates[0].A.flatten()])
    torch.testing.assert_close(tensors["A"], expected)
