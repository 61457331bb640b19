"""What a dry run says of who set a setting: the named file, read again, has the composed value."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from randlora.config import CONFIGS, register_resolvers, version_base
from randlora.origins import COMMAND_LINE, Writer, choices, differences, origins


class Composed:
    """A command line's settings with interpolations as they stand, and what set each."""

    def __init__(self, *overrides: str) -> None:
        register_resolvers()
        with initialize_config_dir(str(CONFIGS), **version_base()):
            config = compose("train", list(overrides), return_hydra_config=True)
            hydra = config.hydra
            with open_dict(config):
                del config["hydra"]
            self.settings: Any = OmegaConf.to_container(config)
            self.origins, self.choices = origins(config, hydra), choices(hydra)
            self.differences = differences(config, hydra)


def at(settings: Any, key: str) -> Any:
    """The value under a dotted key of nested mappings."""
    for part in key.split("."):
        settings = settings[part]
    return settings


def read(source: str, key: str) -> Any:
    """What a file under configs/ has for a key of the whole settings, by Hydra's rule of the header."""
    path = CONFIGS / source
    settings: Any = OmegaConf.to_container(OmegaConf.load(path))
    if source != "train.yaml" and "# @package _global_" not in path.read_text():
        for part in reversed(path.parent.relative_to(CONFIGS).parts):
            settings = {part: settings}
    return at(settings, key)


def is_leaf(value: Any) -> bool:
    return not isinstance(value, dict) or not value


def leaves(settings: dict[str, Any]) -> set[str]:
    below = ({key} if is_leaf(value) else {f"{key}.{k}" for k in leaves(value)} for key, value in settings.items())
    return set().union(*below)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "method=lora task=mrpc model=minilm logger=wandb trainer.max_steps=5 shots=2",
        "experiment=clip_b32/randlora task=dtd shots=4 sweep=images_few_shot targets=[a,b] tags=[x]",
        "experiment=llama3_8b/dora_16 trainer.learning_rate=0.5 task.source.root=/data",
        "experiment=pretrain_clip_tiny",
        "experiment=figure1/dinov2_lora method.rank=3",
    ],
)
def test_what_the_last_writer_wrote_is_the_setting(line: str) -> None:
    composed, words = Composed(*line.split()), dict(word.split("=") for word in line.split())
    assert set(composed.origins) == leaves(composed.settings)
    for key, (*_, last) in composed.origins.items():
        if last.source == COMMAND_LINE:
            expected = at(OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={words.pop(key)}"])), key)
        else:
            expected = read(last.source, key)
        assert at(composed.settings, key) == expected == last.value, key
    assert [word for word in words if word not in composed.choices] == []  # every other word chose a group's option


def test_four_files_and_an_override_set_the_learning_rate(tmp_path: Path) -> None:
    """Method, rates, a user's experiment and the command line, in the order in which the later one wins."""
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults: [override /method: lora]\ntrainer: {learning_rate: 0.2, epochs: 3}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    words = ("experiment=mine", f"hydra.searchpath=[{tmp_path}]", "trainer.learning_rate=0.3")
    composed = Composed(*words)
    *files, override = composed.origins["trainer.learning_rate"]
    assert files == [
        Writer("trainer/default.yaml", 1e-3),
        Writer("method/lora.yaml", 1e-3),
        Writer("rates/clip_tiny_lora.yaml", 3e-3),
        Writer(files[3].source, 0.2),
    ]
    assert override == Writer(COMMAND_LINE, 0.3)
    assert Path(files[3].source).resolve() == tmp_path / "experiment" / "mine.yaml"
    assert composed.choices["method"] == [Writer("train.yaml", "randlora"), Writer(files[3].source, "lora")]
    rows = {row.split()[0]: row.split(maxsplit=2) for row in composed.differences.splitlines()[1:]}
    assert rows["trainer.learning_rate"][1:] == [
        "0.3",
        f"command line, over 0.2 in {files[3].source}, 0.003 in rates/clip_tiny_lora.yaml, 0.001 in method/lora.yaml, "
        "0.001 in trainer/default.yaml",
    ]
    assert rows["trainer.epochs"][1] == "3"
    assert rows["method"][1:] == ["lora", f"{files[3].source}, over randlora in train.yaml"]
    assert "model" not in rows  # nobody chose another
    assert "trainer.warmup" not in rows  # nobody changed it


def test_one_item_of_a_list() -> None:
    key = "task.templates"
    composed = Composed(f"{key}.0=one")
    assert composed.origins[key][-1] == Writer(COMMAND_LINE, ["one"])
    assert composed.settings["task"]["templates"] == ["one"]


def test_interpolations_are_shown_as_values() -> None:
    """DTD's epochs are ${epochs:10,76}."""
    rows = Composed("task=dtd").differences.splitlines()
    (row,) = (row for row in rows if row.startswith("trainer.epochs "))
    assert row.split()[1:] == ["76", "task/dtd.yaml,", "over", "10", "in", "trainer/default.yaml"]
