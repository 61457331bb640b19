"""What the paper's grid costs on one H100, row by row, as the page docs/paper_costs.md: planned, not measured.

python scripts/grid_cost.py > docs/paper_costs.md
"""

from __future__ import annotations

import re

from omegaconf import OmegaConf

from randlora.analysis.grid_cost import PEAK, UTILISATION, Table, costs
from randlora.config import CONFIGS
from randlora.studies.tables import markdown

METHODS = ("lora", "vera", "nola", "randlora", "full")
FAMILIES = {11: "clip_b32", 12: "clip_l14", 13: "clip_h14", 14: "dinov2_b14"}
LANGUAGE = ("qwen2_0_5b", "phi3_mini", "llama3_8b")
PAGE = """# What the paper's grid costs, planned

**Planned, not measured**: no figure on this page is from a card. Of every row of the paper's Tables 11 to 15 it has the
operations of a step, forward and backward, as `torch.utils.flop_counter` counts them on tensors without values; the
memory of that step as `dry_run=true` plans it; and the hours of all its runs on one H100 that reaches {utilisation:.0%}
of its {peak:.0f} TFLOP/s in bf16. Small models, and runs that wait for images, reach less: take the hours as the least.
Scores on validation and test sets are not counted. A row of Tables 11 to 14 is {tasks} data sets with {budgets} budgets
of examples, one of Table 15 the two mixtures of questions, each example as long as it may be. RandLoRA's operations are
those of the execution plan that is chosen for a CPU.

{table}

```bash
python scripts/grid_cost.py > docs/paper_costs.md    # some minutes
```
"""
NAMES = (
    "table", "experiment", "trained parameters", "memory, GiB", "TFLOP a step", "ms a step", "runs", "steps", "hours",
)  # fmt: skip


def tables() -> list[Table]:
    """Tables 11 to 15 of the paper."""
    few, many = (swept(name) for name in ("images_few_shot", "images_fraction"))
    shots, fractions = [int(value) for value in few["shots"]], [float(value) for value in many["fraction"]]
    images = [
        Table(number, [f"{family}/{method}" for method in METHODS], few["task"], shots, fractions)
        for number, family in FAMILIES.items()
    ]
    folders = [CONFIGS / "experiment" / family for family in LANGUAGE]
    language = [f"{folder.name}/{path.stem}" for folder in folders for path in sorted(folder.glob("*.yaml"))]
    return [*images, Table(15, language, ("commonsense_15k", "commonsense_170k"), fractions=[1.0])]


def swept(sweep: str) -> dict[str, list[str]]:
    """What a file of configs/sweep runs through, by name."""
    parameters = OmegaConf.load(CONFIGS / "sweep" / f"{sweep}.yaml").hydra.sweeper.params
    return {str(name): re.split(r",\s*", str(values).strip()) for name, values in parameters.items()}


def main() -> None:
    rows, grid = [], tables()
    for table in grid:
        for cost in costs(table):
            milliseconds = 1000 * cost.largest / (PEAK * UTILISATION)
            rows.append((
                str(cost.table), cost.row, f"{cost.parameters:,}", f"{cost.memory / 2**30:.1f}",
                f"{cost.largest / 1e12:.1f}", f"{milliseconds:.0f}", str(cost.runs), f"{cost.steps:,}",
                f"{cost.hours():,.1f}",
            ))  # fmt: skip
    images = grid[0]
    about = {"tasks": len(images.tasks), "budgets": len(images.shots) + len(images.fractions)}
    print(PAGE.format(table=markdown(NAMES, rows), utilisation=UTILISATION, peak=PEAK / 1e12, **about), end="")


if __name__ == "__main__":
    main()
