"""One run as a SLURM job that goes on after a pre-emption or its time's end: pip install submitit, then

python scripts/submit.py --folder jobs --minutes 240 --gpus 4 -- model=clip task=cifar10 data_root=FOLDER

`--cluster local` runs it on this machine, as a trial.
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

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


class Run:
    """A command line of train.py, as submitit calls it in the job.

    Args:
        arguments: of train.py.
        processes: how many on the machine, one for each GPU.
    """

    def __init__(self, arguments: Sequence[str], processes: int):
        self.arguments, self.processes = list(arguments), processes
        self.child = 0  # the running command's process id

    def __call__(self) -> None:
        """Raises RuntimeError with the command's exit code where that is not 0."""
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        command = [sys.executable, *(launch if self.processes > 1 else []), str(TRAIN), *self.arguments]
        # SLURM's warning goes to every process of the job: torchrun would die of it before the run has saved.
        process = subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN))
        self.child = process.pid
        while process.poll() is None:
            time.sleep(0.5)
        if process.returncode:
            raise RuntimeError(f"train.py ended with exit code {process.returncode}")

    def checkpoint(self) -> object:
        """submitit's call before it queues the job again: the run stops and saves first, to exit with 85."""
        from submitit.helpers import DelayedSubmission

        with suppress(ProcessLookupError, ChildProcessError):  # it has ended
            os.kill(self.child, signal.SIGTERM)
            os.waitpid(self.child, 0)
        return DelayedSubmission(Run(self.arguments, self.processes))


def main() -> int:
    """Submits, and prints the job's id."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="jobs", help="for submitit's logs, seen by every machine")
    parser.add_argument("--minutes", type=int, default=240, help="of the job; it is queued again at their end")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--partition")
    parser.add_argument("--cluster", choices=["slurm", "local"], default="slurm")
    parser.add_argument("arguments", nargs="+", help="of train.py, after --")
    options = parser.parse_args()
    import submitit

    executor = submitit.AutoExecutor(options.folder, cluster=options.cluster, slurm_max_num_timeout=100)
    executor.update_parameters(timeout_min=options.minutes, gpus_per_node=options.gpus)
    if options.partition:
        executor.update_parameters(slurm_partition=options.partition)
    job = executor.submit(Run(options.arguments, options.gpus))
    print(job.job_id)
    if options.cluster == "local":
        job.result()
    return 0


if __name__ == "__main__":
    sys.exit(main())
