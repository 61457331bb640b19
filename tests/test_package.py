"""The wheel in an environment of its own: from an empty folder, `randlora` composes, trains and records."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import REPOSITORY

# PYTHONPATH would show pip, and the wheel's programs, the clone.
VARIABLES = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that has the wheel, and finds what it needs where this Python does.

    This environment's folder is named in a .pth file, whose folders' own .pth files are not read: a clone that is
    installed here stays out of sight.
    """
    folder = tmp_path_factory.mktemp("package")
    sources = folder / "sources"
    for name in ("randlora", "configs"):
        shutil.copytree(REPOSITORY / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(REPOSITORY / name, sources)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, sources], check=True, env=VARIABLES)
    venv.create(folder / "venv", symlinks=True)
    (wheel,) = folder.glob("randlora-*.whl")
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", *offline, wheel], check=True, env=VARIABLES)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "heavy.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


@pytest.fixture
def run(environment: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs a program of the environment in an empty folder and gives what it prints."""

    def run(program: str, *arguments: str) -> str:
        command = [environment / program, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=VARIABLES, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_is_what_runs_and_has_every_data_file(run: Callable[..., str], environment: Path) -> None:
    code = "import randlora, randlora.config as c; print(randlora.__file__); print(c.CONFIGS)"
    module, configs = map(Path, run("python", "-c", code).split())
    assert module.is_relative_to(environment.parent)
    assert module.parent / "configs" == configs
    for top, installed in ((REPOSITORY / "randlora", module.parent), (REPOSITORY / "configs", configs)):
        paths = (path for path in top.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        assert [path for path in paths if not (installed / path.relative_to(top)).is_file()] == []


def test_five_steps_leave_a_record_in_the_current_folder(run: Callable[..., str], tmp_path: Path) -> None:
    run("randlora", "trainer.max_steps=5", "task.validation_size=10", "task.test_size=20")
    (path,) = tmp_path.glob("runs/digits/clip_tiny/randlora/*/result.json")
    result = json.loads(path.read_text())
    assert (result["status"], result["steps"]) == ("finished", 5)
    assert (path.parent / "adapter" / "adapter.safetensors").is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs"]
