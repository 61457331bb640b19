"""A storm of faults over whole runs, and what became of them (randlora.analysis.campaign).

    python scripts/campaign.py --faults 1000                     # goes on where it was
    python scripts/campaign.py --faults 400 --kinds flipped,truncated,deleted,replaced --seed 1
    python scripts/campaign.py --faults 200 --peer               # transformers' Trainer with PEFT's LoRA
    python scripts/campaign.py --show experiments/faults/*.gz    # the tables alone

Runs are kept below --root while they are compared; the folders of trials that found something stay there.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def command_line(arguments: Sequence[str]) -> int:
    """train.py with these arguments, in this process."""
    from randlora import cli

    sys.argv = ["train.py", *arguments]
    return cli.main()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50, help="how many there are to be")
    parser.add_argument("--kinds", default="", help="only these, with commas between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", action="store_true", help="transformers' Trainer instead")
    parser.add_argument("--root", type=Path, default=Path("runs/campaign"), help="where the runs are")
    parser.add_argument("--results", type=Path, help="a line for each trial; those in it are not done again")
    parser.add_argument("--show", type=Path, nargs="+", help="print the table of such files, and run nothing")
    options = parser.parse_args()

    from randlora.analysis import campaign

    if options.show:
        print(campaign.table([trial for path in options.show for trial in campaign.read(path)]))
        return 0

    import torch

    from randlora.analysis.campaign_programs import Ours, Peer, prepare

    torch.set_num_threads(1)
    model = prepare(options.root.resolve())
    program = Peer(model) if options.peer else Ours(command_line, model)
    kinds = options.kinds.split(",") if options.kinds else campaign.FAULTS
    storm = campaign.Campaign(program, options.root.resolve(), options.seed, kinds)
    results = options.results or options.root / f"{program.name}.jsonl"
    done = campaign.read(results)
    for trial in storm.trials([*done], options.faults):
        with results.open("a") as file:
            file.write(campaign.line(trial) + "\n")
        if not trial.clean:
            print(campaign.line(trial), flush=True)
        done.append(trial)
    print(campaign.table(done))
    return 0 if all(trial.clean for trial in done) else 1


if __name__ == "__main__":
    sys.exit(main())
