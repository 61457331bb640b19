"""One run as a SLURM job that, pre-empted or at its time's end, is queued again and goes on: pip install submitit, then

python scripts/submit.py --minutes 240 --gpus 4 -- model=clip task=cifar10 data_root=FOLDER run_root=SHARED/runs

`--cluster local` runs it on this machine under submitit, `--cluster debug` without, each to its end. The runs of a
sweep are jobs with `python train.py -m hydra/launcher=slurm …`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from randlora.sweeps.jobs import Run, executor

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def main() -> int:
    """Submits, and prints the job's id."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default="jobs", help="for submitit's logs, seen by every machine")
    parser.add_argument("--minutes", type=int, default=240, help="of the job; it is queued again at their end")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1, help="of each node, a process each; 0: one process on the CPU")
    parser.add_argument("--partition")
    parser.add_argument("--cluster", choices=["slurm", "local", "debug"], default="slurm")
    parser.add_argument("arguments", nargs="+", help="of train.py, after --")
    options = parser.parse_args()
    submitting = executor(
        options.folder, options.cluster, options.minutes, options.nodes, options.gpus, options.partition
    )
    job = submitting.submit(Run([sys.executable, str(TRAIN), *options.arguments]))
    print(job.job_id, flush=True)
    if options.cluster != "slurm":
        job.results()
    return 0


if __name__ == "__main__":
    sys.exit(main())
