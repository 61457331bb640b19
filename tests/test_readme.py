"""The README is true: its commands compose, and what it names exists."""

import re
import shlex

import pytest

from conftest import REPOSITORY, settings

TEXT = (REPOSITORY / "README.md").read_text()
COMMANDS = re.findall(r"^python train\.py(.*)$", TEXT, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command: str) -> None:
    words = [word for word in shlex.split(command, comments=True) if word != "-m"]
    settings(*(re.sub(r"=([^\[]*?),.*", r"=\1", word) if "[" not in word else word for word in words))


def test_the_methods_example_keeps_the_contract() -> None:
    """The code under "Adding a method", run as it stands."""
    import torch
    from torch import nn

    import randlora
    from conftest import Toy

    (code,) = re.findall(r"```python\n(@dataclass.*?)```", TEXT, re.DOTALL)
    prelude = "from dataclasses import dataclass\nimport torch\nfrom torch import nn\n"
    scope: dict = {}
    exec(prelude + "from randlora.adapters import Update\nfrom randlora.methods import Method\n" + code, scope)
    model, x = Toy(), torch.randn(2, 5, 24)
    before = model(x)
    report = randlora.adapt(model, scope["Scaled"](), ["square", "tall", "c_attn[q]"])
    assert report.trainable_parameters == 24 + 60 + 24
    torch.testing.assert_close(model(x), before)
    nn.init.constant_(model.square.updates[0].g, 1.0)
    changed = model(x)
    assert not torch.allclose(changed, before, atol=1e-3)
    randlora.merge(model)
    torch.testing.assert_close(model(x), changed, rtol=1e-4, atol=1e-4)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 5


def test_the_speed_page_shows_its_figures() -> None:
    """Every table row of the page's last part is what the committed figures give."""
    import subprocess
    import sys

    folder = REPOSITORY / "experiments" / "speed"
    command = [sys.executable, "scripts/benchmark.py", "--show", str(folder / "figures.json")]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True).stdout
    page = (folder / "README.md").read_text().partition("## Tables")[2]
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert rows == [line for line in page.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make (\w+)`", TEXT))))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", TEXT))))
def test_links_lead_somewhere(path: str) -> None:
    assert (REPOSITORY / path).exists()
