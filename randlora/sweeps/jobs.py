"""Runs as jobs of SLURM, by submitit: one that is pre-empted, or at its time's end, is queued again and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from randlora.errors import FAILED, FINISHED, INTERRUPTED, SettingsError

GRACE = 600  # seconds in which a scheduler that has sent SIGTERM ends the job


class Run:
    """A command line as submitit calls it in the job, once for each GPU.

    Args:
        command: The program and its arguments.
        environment: Variables that it has beside the job's own.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        self.command, self.environment = command, environment or {}
        self.child = 0  # the running command's process id

    def __call__(self) -> None:
        """Raises RuntimeError with the command's exit code where that is not 0."""
        from submitit.helpers import TorchDistributedEnvironment

        tasks = TorchDistributedEnvironment()
        if tasks.world_size > 1:
            tasks.export(set_cuda_visible_devices=False, overwrite=True)  # each process takes the GPU of its LOCAL_RANK
        # SLURM warns every process of a job. The first task's `checkpoint` alone acts on it, once there is a child: the
        # child inherits that it does not hear it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        with subprocess.Popen(self.command, env=os.environ | self.environment) as process:
            self.child = process.pid
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
            try:
                code = process.wait()
            finally:
                process.terminate()  # where the wait was broken off
                self.child = 0
        if code == INTERRUPTED:
            if tasks.rank > 0:
                sys.exit()  # no result: the first task speaks for all
            # By SIGTERM, which submitit ignores: whoever sent it knows whether the job is cancelled or queued again.
            time.sleep(GRACE)
        if code:
            raise RuntimeError(f"the run ended with exit code {code}")

    def checkpoint(self) -> object:
        """submitit's call before it queues the job again: the run stops and saves first."""
        from submitit.helpers import DelayedSubmission

        if self.child:
            with suppress(ProcessLookupError, ChildProcessError):  # it has ended
                os.kill(self.child, signal.SIGTERM)
                os.waitpid(self.child, 0)  # the run that was broken into may hold the lock of Popen.wait
        return DelayedSubmission(Run(self.command, self.environment))


def executor(folder: Path, cluster: str, minutes: int, nodes: int, gpus: int, partition: str | None) -> Any:
    """submitit's, which submits jobs.

    Args:
        folder: For the jobs and what they say, seen by every machine.
        cluster: slurm; local: processes of this machine under submitit's supervision; debug: this process.
        minutes: Of a job; it is queued again at their end.
        nodes: Machines of a job.
        gpus: Of each machine, a process each; 0: one process on the CPU.
        partition: SLURM's, or None for its default.

    Raises:
        SettingsError: submitit is not installed, SLURM is not on this machine, or several machines are to be this one.
    """
    try:
        import submitit
    except ImportError as error:
        raise SettingsError("submitit is not installed: pip install submitit") from error
    try:
        executor = submitit.AutoExecutor(str(folder), cluster=cluster, slurm_max_num_timeout=100)
        executor.update_parameters(
            timeout_min=minutes, nodes=nodes, tasks_per_node=max(gpus, 1), gpus_per_node=gpus or None,
            slurm_partition=partition, slurm_signal_delay_s=120,
        )  # fmt: skip
    except RuntimeError as error:
        raise SettingsError(f"cluster={cluster}: {error}; local runs the jobs on this machine") from error
    except ValueError as error:
        raise SettingsError(f"cluster={cluster}, nodes={nodes}: {error}") from error
    return executor


class Jobs:
    """Up to so many jobs at a time, as `randlora.sweeps.pool.Pool` has processes.

    They outlive this process. Asked for a job again, it looks after the one that SLURM still has.

    Args:
        executor: submitit's.
        workers: How many jobs at a time.
    """

    def __init__(self, executor: Any, workers: int):
        self._executor, self.workers = executor, workers
        self._jobs: dict[int, Any] = {}

    @property
    def free(self) -> bool:
        """Whether another job may be submitted."""
        return len(self._jobs) < self.workers

    @property
    def running(self) -> Sequence[int]:
        """The keys of the jobs that wait or run."""
        return [*self._jobs]

    def start(self, key: int, act: Run, log: Path) -> None:
        """Submits a job, or looks after the one that was submitted before and has not ended.

        Args:
            key: What it is called here.
            act: What it does.
            log: A link to what it says on stderr, beside which its id is kept.
        """
        kept = log.with_suffix(".job")
        job = self._submitted(kept)
        if job is None:
            job = self._executor.submit(act)
            kept.write_text(job.job_id)
            log.unlink(missing_ok=True)
            log.symlink_to(os.path.relpath(job.paths.stderr, log.parent))
        self._jobs[key] = job

    def _submitted(self, kept: Path) -> Any:
        """The job of this id, where SLURM has it and it has not ended."""
        import submitit

        if self._executor.cluster != "slurm" or not kept.is_file():
            return None
        job: Any = submitit.SlurmJob(self._executor.folder, kept.read_text().strip(), [0])
        return None if job.done(force_check=True) else job

    def ended(self, seconds: float) -> list[tuple[int, int]]:
        """Waits up to so many seconds until a job ends; the keys of those that have, each with 0 or FAILED."""
        deadline = time.monotonic() + seconds
        while not (done := [key for key, job in self._jobs.items() if job.done()]) and time.monotonic() < deadline:
            time.sleep(min(seconds, 0.1))
        return [(key, self._code(self._jobs.pop(key))) for key in done]

    def _code(self, job: Any) -> int:
        try:
            job.results()
        except Exception:  # with the whole log of the job in its text; why it failed is in the run's own record
            return FAILED
        return FINISHED

    def signal(self, number: int) -> None:
        """Cancels all jobs, whatever the signal: their runs stop with a checkpoint, and are not queued again."""
        for job in self._jobs.values():
            job.cancel(check=False)

    def end_at_once(self) -> None:
        """Looks after them no longer."""
        self.signal(signal.SIGKILL)
        self._jobs.clear()

    def close(self) -> None:
        """Leaves the jobs to their cluster."""
