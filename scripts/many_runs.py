"""A trial: K runs over one frozen base in one process, their examples side by side; see randlora.analysis.many_runs.

python scripts/many_runs.py --json figures.json            all trials; those that the file has already are kept
python scripts/many_runs.py "MiniLM, 8 texts" --rounds 3
python scripts/many_runs.py --show figures.json            the table of such a file, in Markdown
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from randlora.analysis.many_runs import Trunk, measured, table
from randlora.bounds import count
from randlora.config import settings
from randlora.experiment import Experiment
from randlora.methods import Method, RandLoRA

KRONECKER = RandLoRA(rank=6, basis="kronecker")
TRIALS: dict[str, tuple[str, Method, int]] = {
    "clip_tiny, 4 images": ("clip_tiny_vision", RandLoRA(rank=6), 4),
    "clip_tiny, 16 images": ("clip_tiny_vision", RandLoRA(rank=6), 16),
    "clip_tiny, 4 images, Kronecker": ("clip_tiny_vision", KRONECKER, 4),
    "MiniLM, 8 texts": ("minilm", RandLoRA(rank=6), 8),
    "MiniLM, 8 texts, Kronecker": ("minilm", KRONECKER, 8),
    "CLIP ViT-B/32's tower, 2 images": ("clip_vit_b32_vision", RandLoRA(rank=6), 2),
}
TEXT = 32  # tokens


def trunk(model: str) -> Trunk:
    """A model of configs/model with its embedded or random weights, and random inputs."""
    task = "sst2" if model == "minilm" else "digits"
    random = {"minilm": ["model.weights=null"], "clip_vit_b32_vision": ["model.pretrained=null"]}.get(model, [])
    experiment = Experiment.from_config(settings(f"model={model}", f"task={task}", "dry_run=true", *random))
    torch.manual_seed(0)
    backbone = experiment.model.load()
    assert backbone.features is not None
    pixels = backbone.pixels

    def inputs(size: int) -> Any:
        if pixels is not None:
            return torch.randn(size, 3, pixels.size, pixels.size)
        return {"input_ids": torch.randint(1000, 20000, (size, TEXT)), "attention_mask": torch.ones(size, TEXT).long()}

    return Trunk(backbone.module, backbone.features, backbone.width, experiment.patterns, inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="*", metavar="trial", help=f"of {'; '.join(TRIALS)}; all if none")
    parser.add_argument("--runs", default="1,2,4", help="how many at once, with commas")
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--threads", type=count, default=1)
    parser.add_argument("--json", type=Path, help="where to write the seconds")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing, print the table of such a file")
    options = parser.parse_args()
    if options.show is not None:
        print(table(json.loads(options.show.read_text())["trials"]))
        return
    for name in options.trials:
        if name not in TRIALS:
            parser.error(f"{name!r} is not one of {'; '.join(TRIALS)}")
    torch.set_num_threads(options.threads)
    counts = [int(number) for number in options.runs.split(",")]
    report: dict[str, Any] = {"threads": options.threads, "torch": torch.__version__, "trials": {}}
    if options.json is not None and options.json.exists():
        report |= {"trials": json.loads(options.json.read_text())["trials"]}
    for name in options.trials or TRIALS:
        if name in report["trials"]:
            continue
        model, method, size = TRIALS[name]
        seconds = measured(trunk(model), method, size, counts, options.rounds)
        report["trials"][name] = {"counts": counts, "rounds": options.rounds, "seconds": seconds}
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["trials"]))


if __name__ == "__main__":
    main()
