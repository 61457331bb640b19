"""scripts/submit.py under submitit's executor for this machine, which warns and queues again as its one for SLURM does.

The script is copied beside a program that stands for train.py, and so runs that one.
"""

import os
import runpy
import shutil
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_interruption import code_of, forked, record_of, run_code

from conftest import REPOSITORY
from randlora.errors import FINISHED, INTERRUPTED

pytest.importorskip("submitit", reason="submitit is not installed: scripts/submit.py is not tested")

# Trains, and at its third step, where nothing was trained before, has the job warned and waits to be stopped for it.
TRAIN = """
    import os, signal, sys, time
    from pathlib import Path

    from test_interruption import run_code
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from randlora.signals import STOP

    root = Path(sys.argv[1])
    steps = []

    def warn(*_):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getppid(), signal.SIGUSR2)
            deadline = time.monotonic() + 20
            while not STOP.came and time.monotonic() < deadline:
                time.sleep(0.01)

    if not list(root.rglob("checkpoints")):
        register_optimizer_step_post_hook(warn)
    with STOP:
        sys.exit(run_code(root))
"""
# Notes who it is of how many. At first every process is warned, as by SLURM, and stops once the first is told to.
PROCESSES = """
    import os, signal, sys, time
    from pathlib import Path

    root, stopped = Path(sys.argv[1]), Path(sys.argv[1], "stopped")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    signal.alarm(60)
    again = stopped.exists()
    with (root / os.environ["RANK"]).open("a") as file:
        print(*(os.environ[name] for name in names), file=file)
    if again:
        sys.exit(0)
    signal.signal(signal.SIGTERM, lambda *_: stopped.touch())
    while len([path for path in root.iterdir() if path.name in "01"]) < 2:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getppid(), signal.SIGUSR2)
    while not stopped.exists():
        time.sleep(0.01)
    sys.exit(85)
"""


@pytest.fixture
def submit(
    tmp_path: Path, program: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, list[str]], int]:
    (tmp_path / "scripts").mkdir()
    script = Path(shutil.copy(REPOSITORY / "scripts" / "submit.py", tmp_path / "scripts"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY / "tests"), os.environ["PYTHONPATH"]]))

    def run(train: str, options: list[str]) -> int:
        (tmp_path / "train.py").write_text(textwrap.dedent(train))
        (tmp_path / "runs").mkdir()
        jobs = tmp_path / "jobs"
        return program(script, "--cluster", "local", "--folder", jobs, *options, "--", tmp_path / "runs")

    return run


def log(folder: Path, of: str = "out") -> str:
    return "".join(path.read_text() for path in sorted(folder.glob(f"jobs/*_log.{of}")))


def test_a_warned_run_is_queued_again_and_ends_as_if_nothing_had_been(tmp_path: Path, submit: Any) -> None:
    """Oracle: the same run without a job, to the byte."""
    assert code_of(forked(partial(run_code, tmp_path / "undisturbed"))) == FINISHED
    assert submit(TRAIN, ["--gpus", "0"]) == 0
    assert log(tmp_path).count("Requeued job") == 1
    assert record_of(tmp_path / "runs")["status"] == "finished"
    ours, theirs = (tmp_path / name for name in ("runs", "undisturbed"))
    (adapter,), (expected,) = (list(root.rglob("adapter/adapter.safetensors")) for root in (ours, theirs))
    assert adapter.read_bytes() == expected.read_bytes()
    assert "checkpoint at step 3: the same command goes on" in log(tmp_path, "err")


def test_a_process_for_each_gpu_of_one_job(tmp_path: Path, submit: Any) -> None:
    assert submit(PROCESSES, ["--gpus", "2"]) == 0
    assert log(tmp_path).count("Requeued job") == 1
    first, second = ((tmp_path / "runs" / rank).read_text().splitlines() for rank in "01")
    assert [line.split()[:3] for line in first] == [["0", "0", "2"]] * 2
    assert [line.split()[:3] for line in second] == [["1", "1", "2"]] * 2
    assert len({tuple(line.split()[3:]) for line in first + second}) == 1  # where they meet
    assert "exit code" not in log(tmp_path, "err")  # nobody died of the warning


def test_what_fails_is_not_queued_again(tmp_path: Path, submit: Any) -> None:
    with pytest.raises(Exception, match=r"train\.py ended with exit code 2"):
        submit("raise SystemExit(2)", ["--gpus", "0"])
    assert "Requeued" not in log(tmp_path)


def test_after_sigterm_the_scheduler_has_time_to_end_the_job(
    tmp_path: Path, program: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM sends SIGTERM to what it cancels and to what it queues again by itself: we do neither."""
    script = runpy.run_path(str(REPOSITORY / "scripts" / "submit.py"))
    (tmp_path / "train.py").write_text(f"raise SystemExit({INTERRUPTED})")
    waited: list[float] = []
    run = script["Run"]([])
    monkeypatch.setitem(run.__call__.__globals__, "TRAIN", tmp_path / "train.py")
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", "DEBUG_1")
    with pytest.raises(RuntimeError, match=f"exit code {INTERRUPTED}"):
        run()
    assert waited == [script["GRACE"]]
