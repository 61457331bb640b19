"""The README is true, and the pages' commands compose."""

import re
import shlex
from collections.abc import Callable

import pytest

from conftest import REPOSITORY, settings

PAGES = {
    path.name: path.read_text() for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
}
TEXT = PAGES["README.md"]
BASH = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\w+=\S+ )*(?:python|accelerate launch .*|torchrun .*) ?train\.py(.*?)&?$", re.MULTILINE)
# Those with files of a reader's own are run, in test_docs.py.
COMMANDS = sorted(
    {
        command.strip()
        for text in PAGES.values()
        for block in BASH.findall(text)
        for command in COMMAND.findall(block)
        if "my_lab" not in command
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command: str) -> None:
    words = [word for word in shlex.split(command, comments=True) if word != "-m"]
    settings(*(re.sub(r"=([^\[]*?),.*", r"=\1", word) if "[" not in word else word for word in words))


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 20


def test_the_result_is_what_the_records_say() -> None:
    """Mean and deviation of every method, and Student's interval of RandLoRA's differences, from the study's runs."""
    from statistics import mean, stdev

    from scipy.stats import ttest_rel

    from randlora.records import read

    scores: dict[str, dict[int, float]] = {}
    parameters: dict[str, int | None] = {}
    for result in read(REPOSITORY / "experiments" / "image_protocol"):
        if (result.collection, result.task, result.model, result.shots) == ("records", "cifar10", "vit_s14", 16):
            assert result.headline.value is not None
            scores.setdefault(result.method, {})[result.seed] = 100 * result.headline.value
            parameters[result.method] = result.trainable_parameters
    ours = scores["randlora"]
    rows = []
    for name in ("RandLoRA", "LoRA", "VeRA", "NoLA", "full fine-tuning"):
        method = name.split()[0].lower()
        values = scores[method]
        assert sorted(values) == sorted(ours) == [0, 1, 2, 3, 4]
        difference = ""
        if method != "randlora":
            low, high = ttest_rel([ours[seed] for seed in values], list(values.values())).confidence_interval(0.95)
            gap = mean(ours.values()) - mean(values.values())
            difference = f"{gap:+.1f} ({low:.1f} to {high:.1f}) "
        cell = f"{mean(values.values()):.1f} ± {stdev(values.values()):.1f}"
        rows.append(f"| {name} | {parameters[method]:,} | {cell} | {difference}|")
    assert "\n".join(rows) in TEXT


def test_the_speed_page_shows_its_figures(program: Callable[..., int], capsys: pytest.CaptureFixture) -> None:
    """Every table row of the page's last part is what the committed figures give."""
    folder = REPOSITORY / "experiments" / "speed"
    assert program(REPOSITORY / "scripts/benchmark.py", "--show", folder / "figures.json") == 0
    shown = capsys.readouterr().out
    page = (folder / "README.md").read_text().partition("## Tables")[2]
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert rows == [line for line in page.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make (\w+)`", TEXT))))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", TEXT))))
def test_links_lead_somewhere(path: str) -> None:
    assert (REPOSITORY / path).exists()
