"""The scripts in examples/ run offline and do what they say; each checks that its outputs agree in the end."""

import re
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch

from conftest import REPOSITORY

EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))
# What the example must reach, by the sentence that tells it: far above what chance or the model before gives.
REACHED = {
    "plain_torch": (r"upside down, after: +([\d.]+)", 0.8),
    "hf_trainer": (r"accuracy on new texts: ([\d.]+)", 0.8),
    "accelerate_loop": (r"accuracy on new digits: ([\d.]+)", 0.8),
    "compiled_with_head": (r"accuracy on new digits: ([\d.]+)", 0.8),
}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example(script: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # inductor's takes seconds
    runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    pattern, least = REACHED[script.stem]
    (score,) = re.findall(pattern, said)
    assert float(score) > least
    assert said.rstrip().splitlines()[-1].endswith(("the same outputs", "the same features"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_an_example_fits_a_page(script: Path) -> None:
    assert len(script.read_text().splitlines()) <= 80
