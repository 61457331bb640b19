"""A run as a SLURM job, queued again and going on when it is pre-empted or out of time: pip install submitit, then

python scripts/submit.py --minutes 240 --gpus 4 -- model=clip task=cifar10 data_root=FOLDER run_root=SHARED/runs

`--cluster local` runs it on this machine under submitit, `--cluster debug` without, each to its end.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from randlora.errors import INTERRUPTED

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
WARNING = 120  # seconds before the end of a job's time at which it is told, to finish its step and save
GRACE = 600  # seconds in which a scheduler that has sent SIGTERM ends the job


class Run:
    """A command line of train.py as submitit calls it in the job, once for each GPU.

    Args:
        arguments: of train.py.
    """

    def __init__(self, arguments: Sequence[str]):
        self.arguments = list(arguments)
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
        with subprocess.Popen([sys.executable, str(TRAIN), *self.arguments]) as process:
            self.child = process.pid
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
            try:
                code = process.wait()
            finally:
                process.terminate()  # where the wait was broken off
        if code == INTERRUPTED and tasks.rank > 0:
            sys.exit()  # no result: the first task speaks for all
        if code == INTERRUPTED:
            # By SIGTERM, which submitit ignores: the scheduler that sent it knows whether the job is queued again.
            time.sleep(GRACE)
        if code:
            raise RuntimeError(f"train.py ended with exit code {code}")

    def checkpoint(self) -> object:
        """submitit's call before it queues the job again: the run stops and saves first."""
        from submitit.helpers import DelayedSubmission

        if self.child:
            with suppress(ProcessLookupError, ChildProcessError):  # it has ended
                os.kill(self.child, signal.SIGTERM)
                os.waitpid(self.child, 0)
        return DelayedSubmission(Run(self.arguments))


def main() -> int:
    """Submits, and prints the job's id."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="jobs", help="for submitit's logs, seen by every machine")
    parser.add_argument("--minutes", type=int, default=240, help="of the job; it is queued again at their end")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1, help="of each node, a process each; 0: one process on the CPU")
    parser.add_argument("--partition")
    parser.add_argument("--cluster", choices=["slurm", "local", "debug"], default="slurm")
    parser.add_argument("arguments", nargs="+", help="of train.py, after --")
    options = parser.parse_args()
    import submitit

    executor = submitit.AutoExecutor(options.folder, cluster=options.cluster, slurm_max_num_timeout=100)
    executor.update_parameters(
        timeout_min=options.minutes, nodes=options.nodes, tasks_per_node=max(options.gpus, 1),
        gpus_per_node=options.gpus or None, slurm_partition=options.partition, slurm_signal_delay_s=WARNING,
    )  # fmt: skip
    job = executor.submit(Run(options.arguments))
    print(job.job_id, flush=True)
    if options.cluster != "slurm":
        job.results()
    return 0


if __name__ == "__main__":
    sys.exit(main())
