"""What an update is like. Oracles: numpy's decompositions, and matrices whose spectrum is known."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import randlora
from conftest import REPOSITORY, TOY_TARGETS, Toy, settings
from randlora.errors import FINISHED, SettingsError
from randlora.experiment import Experiment
from randlora.methods import LoRA, RandLoRA
from randlora.run import run
from randlora.use.spectra import Look, spectra, spectrum


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_quantities_are_numpys() -> None:
    weight, delta, k = matrix(20, 12, 0), 0.1 * matrix(20, 12, 1), 3
    measured = spectrum("site", weight, delta, Look(k, 0.6))
    w, d = weight.numpy(), delta.numpy()
    values = np.linalg.svd(d, compute_uv=False)
    assert measured.rank == np.linalg.matrix_rank(d) == 12
    assert measured.full == 1.0
    assert measured.stable_rank == pytest.approx(np.linalg.norm(d, "fro") ** 2 / np.linalg.norm(d, 2) ** 2)
    p = values / values.sum()
    assert measured.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert measured.energy == pytest.approx((values[:k] ** 2).sum() / (values**2).sum())
    assert measured.relative_norm == pytest.approx(np.linalg.norm(d) / np.linalg.norm(w))
    u, _, vt = np.linalg.svd(w)
    assert measured.alignment == pytest.approx((u[:, :k].T @ d @ vt[:k].T).__pow__(2).sum() / (d**2).sum())
    new = np.linalg.svd(w + d)[0][:, :k]
    assert measured.intruders == sum(np.abs(u[:, :12].T @ new[:, i]).max() < 0.6 for i in range(k))


def test_known_spectra() -> None:
    """A multiple of W0 lies in its directions and brings none; a large one of rank one across them is an intruder."""
    weight = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]))
    scaled = spectrum("site", weight, 0.5 * weight, Look(2))
    assert (scaled.rank, scaled.full, scaled.relative_norm, scaled.intruders) == (4, 1.0, pytest.approx(0.5), 0)
    assert [scaled.alignment, scaled.energy] == pytest.approx(2 * [(64 + 16) / 85])
    across = spectrum("site", weight, 100 * torch.full((4, 4), 0.25), Look(1, 0.6))
    assert (across.rank, across.full, across.intruders) == (1, 0.25, 1)
    assert [across.stable_rank, across.effective_rank, across.energy] == pytest.approx([1.0, 1.0, 1.0])
    assert across.alignment == pytest.approx(1 / 16)
    none = spectrum("site", weight, torch.zeros(4, 4), Look())
    assert (none.rank, none.relative_norm, none.intruders) == (0, 0.0, 0)
    assert (scaled.values[0], scaled.values[16], scaled.values[-1]) == (1.0, 0.25, 0.125)
    assert (*across.values[:6], *across.values[-6:]) == pytest.approx((*[1.0] * 6, *[0.0] * 6))
    assert (len(scaled.values), none.values) == (33, (0.0,) * 33)


@pytest.mark.parametrize(
    ("method", "rank"), [(LoRA(rank=3), lambda least: 3), (RandLoRA(rank=3, num_bases=20), lambda least: least)]
)
def test_randlora_has_full_rank_and_lora_its_own(method: LoRA | RandLoRA, rank: Callable[[int], int]) -> None:
    """At every site, slices of fused matrices among them; ΔW is the merged weights' difference."""
    torch.manual_seed(0)
    toy, plain = Toy(), Toy()
    plain.load_state_dict(toy.state_dict())
    randlora.adapt(toy, method, TOY_TARGETS)
    with torch.no_grad():
        for tensor in (p for p in toy.parameters() if p.requires_grad):
            tensor.add_(torch.randn_like(tensor))
    sites = {site.site: site for site in spectra(toy)}
    assert list(sites) == list(dict.fromkeys(sites))
    assert len(sites) == len(TOY_TARGETS)
    assert [site.rank for site in sites.values()] == [rank(min(site.shape)) for site in sites.values()]
    randlora.merge(toy)
    change = toy.c_attn.weight.T[:24] - plain.c_attn.weight.T[:24]
    expected = change.norm() / plain.c_attn.weight.T[:24].norm()
    assert sites["c_attn[q]"].relative_norm == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(SettingsError):
        spectra(plain)


def test_the_command_has_a_row_for_each_site(tmp_path: Path, program: Callable) -> None:
    short = ("trainer.max_steps=1", "trainer.batch_size=8", "task.test_size=8", "task.validation_size=8", "shots=1")
    composed = settings(f"run_root={tmp_path}", "model=clip_tiny_vision", "method=lora", "method.rank=2", *short)
    experiment = Experiment.from_config(composed)
    assert run(experiment, "as: given\n").code == FINISHED
    into = tmp_path / "spectra.csv"
    assert program(REPOSITORY / "train.py", "spectra", experiment.folder, "--into", into) == FINISHED
    *rows, mean = csv.DictReader(into.open())
    assert len(rows) == 18
    assert {row["rank"] for row in rows} == {"2"}
    assert float(mean["relative_norm"]) == pytest.approx(np.mean([float(row["relative_norm"]) for row in rows]))
    means = tmp_path / "spectra.jsonl"
    assert program(REPOSITORY / "train.py", "spectra", experiment.folder, "--into", means) == FINISHED
    (row,) = map(json.loads, means.read_text().splitlines())
    assert row["relative_norm"] == pytest.approx(float(mean["relative_norm"]))
    assert row["rank"] == 2
    assert (row["values"][0], row["values"][-1]) == (1.0, pytest.approx(0.0, abs=1e-5))
    other = Experiment.from_config(settings(f"run_root={tmp_path}", "model=clip_tiny_vision", "method=lora", *short))
    assert run(other, "as: given\n").code == FINISHED
    figure = tmp_path / "spectra.svg"
    both = [f"lora {folder.name}" for folder in (experiment.folder, other.folder)]
    given = ["--into", into, "--figure", figure]
    assert program(REPOSITORY / "train.py", "spectra", experiment.folder, other.folder, *given) == FINISHED
    several = [*csv.DictReader(into.open())]
    assert [row.pop("run") for row in several] == [name for name in both for _ in range(19)]
    assert several[:19] == [*rows, mean]
    assert float(several[-1]["rank"]) == other.method.rank > 2
    assert both[1] in figure.read_text()
