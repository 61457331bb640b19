"""Every shipped YAML composes and builds; targets are allow-listed; signatures change with what changes a result."""

import dataclasses
import json
import re
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from conftest import REPOSITORY, settings
from randlora.config import build
from randlora.errors import SettingsError
from randlora.experiment import Experiment
from randlora.plan import counts
from randlora.records.logger import Logger
from randlora.records.signature import modern, signature


def options(group: str) -> list[str]:
    """The choices of a group, those in its folders too (clip_b32/lora), without those that ask for a setting."""
    folder = REPOSITORY / "configs" / group
    paths = (p for p in folder.rglob("*.yaml") if not p.stem.startswith("_") and "???" not in p.read_text())
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in paths)


def built(group: str, option: str) -> Any:
    """The object of an option, whose keys are its fields: one that is missing could not be set on the command line."""
    config = settings(f"{group}={option}")[group]
    part = build(config)
    assert set(config) - {"_target_"} == {field.name for field in dataclasses.fields(part)}, option
    return part


TASK_OF = {"clip": "cifar10", "vision": "cifar10", "text": "mrpc", "causal_lm": "arc_easy"}


@pytest.mark.parametrize("model", options("model"))
def test_every_model_builds_and_every_target_set_matches(model: str) -> None:
    part = built("model", model)
    for name in part.targets:
        assert part.patterns(name), name
    assert part.module_names() is not None, "run scripts/module_names.py"
    Experiment.from_config(settings(f"model={model}", f"task={TASK_OF[part.kind]}", "dry_run=true"))


MODEL_OF = {"clip": "clip_tiny", "vision": "vit_s14", "text": "minilm", "causal_lm": "smollm2_135m"}


@pytest.mark.parametrize("task", options("task"))
def test_every_task_builds(task: str) -> None:
    kind = built("task", task).kinds[0]
    experiment = Experiment.from_config(settings(f"task={task}", f"model={MODEL_OF[kind]}", "dry_run=true"))
    assert experiment.trainer.steps(experiment.task.training_size(experiment.budget)) > 0


@pytest.mark.parametrize("method", options("method"))
def test_every_method_builds_with_every_kind_of_model(method: str) -> None:
    built("method", method)
    for kind, model in MODEL_OF.items():
        config = settings(f"method={method}", f"model={model}", f"task={TASK_OF[kind]}", "dry_run=true")
        assert Experiment.from_config(config).method.name == method


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_builds(experiment: str) -> None:
    Experiment.from_config(settings(f"experiment={experiment}", "dry_run=true"))


@pytest.mark.parametrize("experiment", [name for name in options("experiment") if "/" in name])
def test_an_experiments_header_has_its_command(experiment: str) -> None:
    text = (REPOSITORY / "configs" / "experiment" / f"{experiment}.yaml").read_text()
    (command,) = re.findall(r"^# python train\.py ([^(\n]*)", text, re.MULTILINE)
    words = [word for word in command.split() if word != "-m"]
    assert f"experiment={experiment}" in words
    settings(*words)


@pytest.mark.parametrize("sweep", options("sweep"))
def test_every_run_of_a_sweep_composes(sweep: str) -> None:
    swept = OmegaConf.load(REPOSITORY / "configs" / "sweep" / f"{sweep}.yaml").hydra.sweeper.params
    runs = BasicSweeper.split_arguments(
        OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in swept.items()]), 999
    )
    assert len(runs[0]) in (10, 15, 22, 30, 44, 88)
    experiments = {
        "glue": ["experiment=glue/roberta_base_lora"],
        "related": [],
        "rank": [],
    }  # the latter two are of experiments
    experiment = experiments.get(sweep, ["experiment=clip_b32/lora"])
    for run in runs[0][:: len(runs[0]) // 10]:
        Experiment.from_config(settings(*experiment, f"sweep={sweep}", *run, "dry_run=true"))


def test_every_trainer_builds() -> None:
    for trainer in options("trainer"):
        built("trainer", trainer)


def test_epochs_follow_the_budget_unless_they_are_given() -> None:
    """The published code takes 10 for few shots, the paper's Table 7 has 76 for all of DTD."""
    epochs = lambda *overrides: settings("task=dtd", *overrides)["trainer"]["epochs"]  # noqa: E731
    assert (epochs(), epochs("fraction=0.5"), epochs("shots=4"), epochs("shots=4", "trainer.epochs=3")) == (
        76,
        76,
        10,
        3,
    )


def test_loggers_build() -> None:
    assert settings("logger=none")["logger"] == {}
    for logger in (name for name in options("logger") if name not in ("none", "tensorboard")):
        assert isinstance(build(settings(f"logger={logger}")["logger"])[logger], Logger)
    assert set(settings("logger=[wandb,tensorboard]")["logger"]) == {"wandb", "tensorboard"}
    assert settings("logger=[wandb,tensorboard]", "logger.wandb.mode=offline")["logger"]["wandb"]["mode"] == "offline"


@pytest.mark.parametrize("optimizer", options("optimizer"))
def test_every_optimizer_builds(optimizer: str) -> None:
    build(settings(f"optimizer={optimizer}")["optimizer"]).check(weight_decay=0.1)


@pytest.mark.parametrize(
    "target", ["os.system", "shutil.rmtree", "randlora_evil.x", "builtins.eval", 3, "randlora.nothing.X"]
)
def test_other_targets_are_refused(target: object) -> None:
    with pytest.raises(SettingsError, match="_target_"):
        build({"_target_": target, "path": "x"})


def test_functions_are_not_built() -> None:
    with pytest.raises(SettingsError, match="not a class"):
        build({"_target_": "randlora.records.record.write", "path": "x", "text": "y"})


def test_users_packages_are_allowed_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"_target_": "collections.OrderedDict"}
    with pytest.raises(SettingsError):
        build(config)
    monkeypatch.setenv("RANDLORA_ALLOW", "collections.")
    assert build(config) == {}


def test_signatures() -> None:
    base = signature(settings())
    same = [
        "run_root=/elsewhere", "data_root=/data", "tags=[a]", "logger=wandb", "trainer.device=cpu", "trainer.workers=2",
        "resume=false", "trainer.save_every=10", "predictions=false",
    ]  # fmt: skip
    for override in same:
        assert signature(settings(override)) == base, override
    for override in (
        "trainer.select=best",
        "trainer.sampling=replacement",
        "seed=1",
        "method.rank=7",
        "trainer.learning_rate=0.1",
        "shots=4",
        "targets=vision",
        "task=mnist",
    ):
        assert signature(settings(override)) != base, override
    assert signature(settings(), task_version=1) == base != signature(settings(), task_version=2)
    assert signature(settings("task=cifar10", "data_root=/a")) == signature(settings("task=cifar10", "data_root=/b"))


def test_signatures_of_old_records_stay() -> None:
    """Oracle: records of before optimisers were a choice, of three studies, as they are committed."""
    records = json.loads((REPOSITORY / "tests" / "old_records.json").read_text())
    assert len(records) == 3
    for record in records:
        config, version = record["config"], record["task_version"]
        assert "betas" in config["trainer"]
        assert signature(config, version) == record["signature"]
        assert signature(modern(config), version) == record["signature"]
    other = modern(records[0]["config"]) | {"optimizer": settings("optimizer=sgd")["optimizer"]}
    assert signature(other) != records[0]["signature"]


def test_settings_that_came_later_are_not_hashed_while_they_change_nothing() -> None:
    config = settings()
    before = config | {"trainer": {k: v for k, v in config["trainer"].items() if k not in ("select", "sampling")}}
    del before["predictions"]
    assert len(before["trainer"]) == len(config["trainer"]) - 2
    assert signature(before) == signature(config)


def test_the_default_optimizer_is_hashed_as_before_there_was_a_choice() -> None:
    config = settings()
    assert config["optimizer"]["betas"] == [0.9, 0.999]
    before = {key: value for key, value in config.items() if key != "optimizer"}
    before["trainer"] = config["trainer"] | {"betas": [0.9, 0.999]}
    assert signature(before) == signature(config) != signature(settings("+optimizer.eps=1e-6"))


def test_configs_are_plain_yaml() -> None:
    for path in (REPOSITORY / "configs").rglob("*.yaml"):
        OmegaConf.load(path)


@pytest.mark.parametrize("pair", options("rates"))
def test_rates_belong_to_a_model_and_a_method(pair: str) -> None:
    """The file name is what picks it, so a misspelt one would be ignored in silence."""
    model, _, method = pair.rpartition("_")
    assert model in options("model")
    assert method in options("method")
    rate = OmegaConf.load(REPOSITORY / "configs" / "rates" / f"{pair}.yaml").trainer.learning_rate
    assert settings(f"model={model}", f"method={method}")["trainer"]["learning_rate"] == rate


def test_few_digits_are_trained_longer_than_all_of_them() -> None:
    """Oracle: the records in experiments/embedded_model and, without shots, in experiments/digits_methods."""
    for options, expected in (([], (6, 32, "none")), (["shots=16"], (40, 16, "clip"))):
        config = settings("task=digits", *options)
        trainer = config["trainer"]
        assert (trainer["epochs"], trainer["batch_size"], config["task"]["augmentation"]) == expected
    few = Experiment.from_config(settings("task=digits", "shots=16", "dry_run=true"))
    assert few.trainer.steps(few.task.training_size(few.budget)) == 400


@pytest.mark.parametrize("arm", [option for option in options("experiment") if option.startswith("rank/")])
def test_arms_of_rank_have_the_parameters_and_the_rank_of_their_names(arm: str) -> None:
    """18 matrices of 192 rows or columns: a LoRA of rank r, or RandLoRA's n · (192 + r) and rank min(n · r, 192)."""
    config = settings(f"experiment={arm}")
    method = config["method"]
    rank, bases = method["rank"], method.get("num_bases")
    thousands, reached = map(int, re.fullmatch(r"rank/(\d+)k_rank(\d+)", arm).groups())  # type: ignore[union-attr]
    assert reached == (rank if bases is None else min(rank * bases, 192))
    count = sum(6 * (rank * (192 + long) if bases is None else bases * (192 + rank)) for long in (576, 768, 768))
    assert counts(Experiment.from_config(config))["trainable_parameters"] == count
    assert abs(count / 1000 / thousands - 1) < 0.05
