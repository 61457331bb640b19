"""Checks this machine's GPU, or as much as can be checked on its CPU, without a network; see docs/cuda.md.

python scripts/gpu.py                                      all checks, at most about ten minutes, into gpu.json
python scripts/gpu.py --tiny                               the quick ones of two methods
python scripts/gpu.py --only "layers in float32,int8 base"
python scripts/gpu.py --page experiments/gpu/*.json > docs/cuda.md     the page made of such files

The file is written after every check; the exit code is 1 where one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: for deterministic products

import torch

from randlora.analysis.device import CHECKS
from randlora.analysis.device.place import Place
from randlora.analysis.device.report import failed, run_checks, sections, table
from randlora.bounds import count

PAGE = """# Checked on a GPU, and on a CPU

{verdict}

```bash
make gpu                        # into gpu.json, at most about ten minutes; without a GPU, the CPU
python scripts/gpu.py --tiny    # seconds
python scripts/gpu.py --page experiments/gpu/*.json > docs/cuda.md    # this page
```

The script needs no network and no data: its models are random or embedded. Errors are ‖found − expected‖ / ‖expected‖.

| check | what is compared |
|---|---|
{checks}

A check that needs what the machine has not is *not run*, and the reason stands there; it has then shown nothing. Other
programs may have shared a CPU: its times say how long the script takes, and no more.

{sections}
"""
NO_CARD = """**No figure on this page is from a GPU.** None was there when it was made: what follows was checked on a
CPU as far as that goes, and everything that only a GPU can show is open. Who has one runs `make gpu` and puts its
`gpu.json` beside the others in `experiments/gpu`."""
CARD = "Of the machines below, with a GPU: {names}. What the others have is of their CPU."


def page(files: list[Path]) -> str:
    reports = [json.loads(file.read_text()) for file in files]
    cards = [report["machine"]["device"] for report in reports if report["machine"]["type"] == "cuda"]
    checks = "\n".join(f"| {name} | {' '.join((check.__doc__ or '').split())} |" for name, check in CHECKS.items())
    verdict = CARD.format(names=", ".join(cards)) if cards else NO_CARD
    return PAGE.format(verdict=verdict, checks=checks, sections=sections(reports))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=there)
    parser.add_argument("--seconds", type=count, default=600, help="after which no further check begins")
    parser.add_argument("--tiny", action="store_true", help="two methods, and none of what takes long")
    parser.add_argument("--only", help=f"checks, with commas; of {', '.join(CHECKS)}")
    parser.add_argument("--threads", type=count, help="of the CPU; 1 where it is what is checked, else torch's")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--page", type=Path, nargs="+", metavar="FILE", help="check nothing, print the page of files")
    options = parser.parse_args()
    if options.page:
        print(page(options.page), end="")
        return 0
    names = options.only.split(",") if options.only else list(CHECKS)
    for name in names:
        if name not in CHECKS:
            parser.error(f"--only {name!r}: it is none of {', '.join(CHECKS)}")
    if options.device == "cuda" and there == "cpu":
        parser.error("--device cuda: torch sees no CUDA device here")
    if options.threads or options.device == "cpu":
        torch.set_num_threads(options.threads or 1)
    place = Place(torch.device(options.device), options.tiny)
    checks = {name: partial(CHECKS[name], place) for name in names}
    report = run_checks(checks, place.device, options.seconds, options.json)
    print(f"{report['machine']['device']}\n\n{table(report)}")
    wrong = failed(report)
    print(f"\n{len(wrong)} failed: {', '.join(wrong)}" if wrong else "\nnone failed")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
