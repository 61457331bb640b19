"""Measures the constants by which execution plans are chosen, and writes them into randlora/methods/costs.json.

python scripts/calibrate.py              the CPU, one thread
python scripts/calibrate.py cuda

The entry of the class of device is replaced, the others stay; see randlora.analysis.calibration.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import randlora.methods
from randlora.analysis.calibration import calibrate

COSTS = Path(randlora.methods.__file__).with_name("costs.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", default="cpu", choices=("cpu", "cuda"))
    device = torch.device(parser.parse_args().device)
    torch.set_num_threads(1)
    table = json.loads(COSTS.read_text()) | {device.type: calibrate(device)}
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
    COSTS.write_text(f"{{\n{rows}\n}}\n")
    print(COSTS.read_text())


if __name__ == "__main__":
    main()
