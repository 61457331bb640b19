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


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make (\w+)`", TEXT))))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", TEXT))))
def test_links_lead_somewhere(path: str) -> None:
    assert (REPOSITORY / path).exists()
