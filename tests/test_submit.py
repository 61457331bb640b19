"""Runs as jobs, under submitit's executor for this machine, which warns and queues again as its one for SLURM does.

The script is copied beside a program that stands for train.py, and so runs that one.
"""

import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from test_interruption import code_of, forked, record_of, run_code
from test_sweeps import launched, states, sweep_of

import randlora.sweeps.jobs
import randlora.sweeps.launcher
from conftest import REPOSITORY
from randlora.analysis.campaign_programs import Ours, prepare
from randlora.errors import FAILED, FINISHED, INTERRUPTED, SettingsError
from randlora.records.logger import Membership
from randlora.sweeps.jobs import GRACE, Jobs, Run, executor

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


@pytest.fixture(autouse=True)
def helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests share can be imported in the jobs, too."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY / "tests"), os.environ["PYTHONPATH"]]))


@pytest.fixture
def submit(tmp_path: Path, program: Callable[..., int]) -> Callable[[str, list[str]], int]:
    (tmp_path / "scripts").mkdir()
    script = Path(shutil.copy(REPOSITORY / "scripts" / "submit.py", tmp_path / "scripts"))

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
    with pytest.raises(Exception, match="the run ended with exit code 2"):
        submit("raise SystemExit(2)", ["--gpus", "0"])
    assert "Requeued" not in log(tmp_path)


def test_after_sigterm_the_scheduler_has_time_to_end_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SLURM sends SIGTERM to what it cancels and to what it queues again by itself: we do neither."""
    waited: list[float] = []
    run = Run([sys.executable, "-c", f"raise SystemExit({INTERRUPTED})"])
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", "DEBUG_1")
    with pytest.raises(RuntimeError, match=f"exit code {INTERRUPTED}"):
        run()
    assert waited == [GRACE]


# What stands for SLURM: jobs are processes of this machine, in whose folder their ids and ends are.
SBATCH = """\
#!/bin/bash
id=$(($(ls "$SLURM_STAND_IN" | wc -l) + 1))
touch "$SLURM_STAND_IN/$id"
SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 \\
    setsid bash -c 'bash "$1"; echo ended > "$2"' - "${@: -1}" "$SLURM_STAND_IN/$id" < /dev/null > /dev/null 2>&1 &
echo $! > "$SLURM_STAND_IN/../group_$id"
echo "Submitted batch job $id"
"""
SRUN = """\
#!/bin/bash
while [[ $1 == -* ]]; do
    case $1 in --output) out=$2; shift;; --error) err=$2; shift;; esac
    shift
done
out=${out//%j/$SLURM_JOB_ID}; err=${err//%j/$SLURM_JOB_ID}
exec "$@" >> "${out//%t/0}" 2>> "${err//%t/0}"
"""
SACCT = """\
#!/bin/bash
echo "JobID|State|NodeList"
for path in "$SLURM_STAND_IN"/*; do
    echo "${path##*/}|$([[ -s $path ]] && echo COMPLETED || echo RUNNING)|here"
done
"""
SCANCEL = '#!/bin/bash\nkill -TERM -- -$(cat "$SLURM_STAND_IN/../group_$1")\n'


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an empty file for each job that runs, and one with a word in it for each that has ended."""
    programs, jobs = tmp_path / "bin", tmp_path / "queue" / "jobs"
    for folder in (programs, jobs):
        folder.mkdir(parents=True)
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT, "scancel": SCANCEL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(jobs))
    return jobs


def struck(root: str, faults: Mapping[int, str], *overrides: str) -> int:
    """A sweep's command whose runs end by a fault at their fifth step, the first time; and its launcher, once."""
    plan = {seed: (fault, 5) for seed, fault in faults.items()}
    strikes = f"from pathlib import Path; from test_sweeps import strike; strike(Path({root!r}), {plan!r}); "
    randlora.sweeps.launcher.PROGRAM = strikes + randlora.sweeps.launcher.PROGRAM

    class Killed(Jobs):
        def ended(self, seconds: float) -> list[tuple[int, int]]:
            if len(self.running) == 2 and not Path(root, "struck_launcher").exists():
                Path(root, "struck_launcher").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().ended(seconds)

    randlora.sweeps.jobs.Jobs = Killed  # type: ignore[misc]
    return launched(Path(root), {}, *overrides)


def test_a_storm_takes_no_job_with_it(slurm: Path, tmp_path: Path) -> None:
    """Oracle: the same sweep in processes, undisturbed. The launcher is killed while two jobs run.

    RANDLORA_JOBS=60 python -m pytest tests/test_submit.py -n 0 -s -k storm is the long run, by submitit alone.
    """
    model, runs = prepare(tmp_path / "vit"), int(os.environ.get("RANDLORA_JOBS", 2))
    command = (f"model.weights={model}", "method=lora", f"seed={','.join(map(str, range(runs)))}")
    command = (*command, "hydra.launcher.workers=2")
    cluster = "slurm" if runs == 2 else "local"
    jobs = ("hydra/launcher=slurm", "hydra.launcher.gpus=0", f"hydra.launcher.cluster={cluster}", "retry=true")
    assert code_of(forked(partial(launched, tmp_path / "undisturbed", {}, *command), 600)) == FINISHED
    root, kinds = tmp_path / "runs", ("kill", "exception", "exit", "memory")
    root.mkdir()
    seeds = Random(20).sample(range(runs), max(1, runs // 4))
    faults = {seed: kinds[index % 4] for index, seed in enumerate(seeds)}
    act = partial(struck, str(root), faults, *command, *jobs)
    assert code_of(forked(act, 3000)) == -signal.SIGKILL
    if cluster == "slurm":
        assert code_of(forked(act, 3000)) == FAILED
        assert len([*slurm.iterdir()]) == 2  # those that were queued are looked after, and not queued again
    code, calls = FAILED, 0
    while code != FINISHED and calls < 4:
        states(root)
        code, calls = code_of(forked(act, 3000)), calls + 1
    assert (code, states(root)) == (FINISHED, ["finished"] * runs)
    assert cluster == "local" or len([*slurm.iterdir()]) == 3
    assert sorted(map(int, (root / "done").read_text().split())) == [*range(runs)]  # none twice
    outputs = partial(Ours.outputs, Ours(lambda arguments: 0, model))
    for ours, theirs in zip(sweep_of(root).jobs, sweep_of(tmp_path / "undisturbed").jobs, strict=True):
        assert outputs(root / ours.folder) == outputs(tmp_path / "undisturbed" / theirs.folder)
    assert any("finished" in log.read_text() for log in root.glob("sweeps/*/*.log"))


def test_a_job_knows_its_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", "DEBUG_1")
    program = (
        "import os; raise SystemExit(os.environ['RANDLORA_SWEEP'] != 'abc' or os.environ['RANDLORA_LABEL'] != 'seed=1')"
    )
    Run([sys.executable, "-c", program], Membership("abc", "seed=1").environment)()
    with pytest.raises(RuntimeError, match="exit code 1"):
        Run([sys.executable, "-c", program], Membership("abc", "seed=2").environment)()


@pytest.mark.parametrize(
    ("cluster", "nodes", "said"),
    [
        ("slurm", 1, "cluster=slurm: .*srun.*; local runs the jobs on this machine"),
        ("local", 2, "nodes=2: .*one node"),
    ],
)
def test_a_cluster_that_is_not_there(cluster: str, nodes: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=said):
        executor(tmp_path, cluster, minutes=1, nodes=nodes, gpus=0, partition=None)
