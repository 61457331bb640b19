"""The pages are true: links lead somewhere, commands compose, and what is added by a page's files works as it says."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import REPOSITORY
from randlora.records.result import Result

DOCS = REPOSITORY / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
FILE = re.compile(r"^`([\w/]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BASH = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Section(NamedTuple):
    """A part of the page on adding things: its complete files, and the command lines that use them."""

    files: dict[str, str]
    commands: list[str]


def sections() -> dict[str, Section]:
    parts = re.split(r"^## (.*)$", PAGES["adding.md"], flags=re.MULTILINE)[1:]
    return {
        title: Section(
            dict(FILE.findall(text)),
            [line for line in "".join(BASH.findall(text)).splitlines() if "FOLDER" not in line],
        )
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    }


SECTIONS = sections()
# A factor for every output of clip_tiny's sites: of a block's in_proj, c_fc and c_proj in six blocks and in three.
VISION, TEXT = 6 * (3 * 192 + 4 * 192 + 192), 3 * (3 * 64 + 4 * 64 + 64)
# Of the last run of a section: what of its record shows that the addition was there.
EVIDENCE = {
    "A method": lambda result, folder: result.method == "rowscale" and result.trainable_parameters == VISION + TEXT,
    "A model": lambda result, folder: result.model == "deit_tiny" and result.head_parameters == 10 * 193,
    "A data set": lambda result, folder: result.task == "scribbles" and result.examples["test"] == 100,
    "An optimiser": lambda result, folder: result.config["optimizer"]["algorithm"] == "RAdam",
    "A logger": lambda result, folder: "test/accuracy" in (folder / "curves.csv").read_text(),
    "A metric": lambda result, folder: 0 < result.metrics["test/balanced_accuracy"] < 1,
    "Another kind of task": lambda result, folder: result.headline.name == "test/mean_absolute_error",
}


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder beside a clone's train.py, and the setting that the page begins with."""
    (tmp_path / "train.py").symlink_to(REPOSITORY / "train.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANDLORA_ALLOW", "my_lab.")
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "my_lab"]:
        del sys.modules[name]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("title", EVIDENCE)
def test_an_addition_works_from_its_files_alone(
    title: str, lab: Path, program: Callable[..., int], capfd: pytest.CaptureFixture
) -> None:
    write(lab, SECTIONS[title].files)
    for command in SECTIONS[title].commands:
        python, *line = shlex.split(command, comments=True)
        assert python == "python"
        assert program(*line) == 0, capfd.readouterr().err
    (path,) = lab.glob("runs/*/*/*/*/result.json")
    result = Result.read(path)
    assert result.status == "finished"
    assert EVIDENCE[title](result, path.parent)


def test_the_page_counts_the_files_of_each_addition() -> None:
    """The table at its top says how many files there are to touch."""
    counted = re.findall(r"^\| \[.*?\]\(#([\w-]+)\).*? \| (\d) \|", PAGES["adding.md"], re.MULTILINE)
    shown = {
        title.lower().replace(" ", "-"): sum(name.startswith("my_lab/") for name in section.files)
        for title, section in SECTIONS.items()
    }
    assert {anchor: int(count) for anchor, count in counted} == {
        anchor: count for anchor, count in shown.items() if count
    }
    assert set(EVIDENCE) == {title for title, section in SECTIONS.items() if section.commands}


def test_all_additions_together_from_outside(lab: Path) -> None:
    """In another process, so that nothing of this one helps."""
    for section in SECTIONS.values():
        write(lab, section.files)
    line = (
        "train.py 'hydra.searchpath=[file://my_lab/configs]' method=row_scale task=digit_values "
        "model=clip_tiny_vision optimizer=radam 'logger=[csv]' dry_run=json"
    )
    done = subprocess.run([sys.executable, *shlex.split(line)], cwd=lab, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trainable_parameters"] == VISION


def targets(page: str) -> list[str]:
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]) if "://" not in target]


def anchors(page: str) -> set[str]:
    """As Python-Markdown makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in targets(page):
        path, _, anchor = target.partition("#")
        assert (DOCS / (path or page)).exists(), target
        assert not anchor or anchor in anchors(path or page), target


@pytest.mark.parametrize("page", PAGES)
def test_paths_of_the_repository_exist(page: str) -> None:
    for path in re.findall(r"`((?:experiments|configs|scripts|examples|tests|randlora)/[\w/.]+)[^`]*`", PAGES[page]):
        assert (REPOSITORY / path).exists(), path


def test_every_page_is_in_the_menu() -> None:
    menu = (REPOSITORY / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert set(re.findall(r"[\w/]+\.md", menu)) == set(PAGES)
