"""What the rows of the paper's tables cost: the operations and the memory of a step, and the steps of all their runs.

Planned, without weights, data or a device: nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from randlora.config import settings
from randlora.experiment import Experiment
from randlora.plan import counts, lengths, memory_plan, step_without_values
from randlora.tasks import ImageClassification

PEAK = 989e12  # operations a second of an H100 SXM in bf16, dense (NVIDIA's data sheet)
UTILISATION = 0.4  # the part of it that a well-fed training of large matrices reaches; small models reach less


class Table(NamedTuple):
    """A table of the paper.

    Args:
        number: The paper's.
        rows: Experiments, such as ``clip_b32/randlora``.
        tasks: That every row has been run on.
        shots: Images for each class, with each of which every task is run.
        fractions: Of the training set, likewise.
    """

    number: int
    rows: Sequence[str]
    tasks: Sequence[str]
    shots: Sequence[int] = ()
    fractions: Sequence[float] = ()

    def runs(self, row: str) -> Iterator[Experiment]:
        """The experiments of a row. Few shots have a length of their own, and all of them one configuration."""
        for task in self.tasks:
            for name, values in (("shots", self.shots), ("fraction", self.fractions)):
                if values:
                    config = settings("dry_run=true", f"experiment={row}", f"task={task}", f"{name}={values[0]}")
                    yield from (Experiment.from_config(config | {name: value}) for value in values)


class Cost(NamedTuple):
    """What a row costs.

    Args:
        table: The paper's number.
        row: The experiment.
        parameters: Trained ones.
        memory: Bytes of its largest step, planned.
        largest: Operations of that step, forward and backward; a multiplication and an addition are two.
        runs: How many.
        steps: Of all runs.
        operations: Of all runs' steps; what is scored is not counted.
    """

    table: int
    row: str
    parameters: int
    memory: int
    largest: float
    runs: int
    steps: int
    operations: float

    def hours(self, peak: float = PEAK, utilisation: float = UTILISATION) -> float:
        """On a device that reaches this part of so many operations a second."""
        return self.operations / (peak * utilisation) / 3600


def step_operations(experiment: Experiment) -> float:
    """The operations of one optimiser step, forward and backward, of examples as long as they can be."""
    # Attention by plain products: the counter knows the CPU's fused kernel not at all.
    plain, counter = sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False)
    with step_without_values(experiment) as (_, loss), plain, counter:
        loss().backward()
    return counter.get_total_flops() * experiment.trainer.batch_size / experiment.trainer.micro


def costs(table: Table) -> Iterator[Cost]:
    """Of its rows, one after the other."""
    for row in table.rows:
        runs = [*table.runs(row)]
        operations, steps = _operations(runs[0]), [int(lengths(run)["steps"]) for run in runs]
        each = [operations(run) for run in runs]
        largest = max(each)
        memory = memory_plan(runs[each.index(largest)])
        assert memory is not None
        trained = counts(runs[0])["trainable_parameters"]
        total = sum(count * size for count, size in zip(steps, each, strict=True))
        yield Cost(table.number, row, trained, memory["total"], largest, len(runs), sum(steps), total)


def _operations(example: Experiment) -> Callable[[Experiment], float]:
    """Of a step of runs that are like the example but for their task.

    CLIP compares the images of a step with the texts of its task's classes or, with ``classes=batch``, of no more
    classes than there are images. Operations are linear in their number.
    """
    if not (isinstance(example.task, ImageClassification) and example.model.kind == "clip"):
        same = step_operations(example)
        return lambda run: same
    first, last = (step_operations(replace(example, task=_of_classes(example.task, count))) for count in (1, 101))
    return lambda run: first + (last - first) * (_texts(run) - 1) / 100


def _texts(run: Experiment) -> int:
    assert isinstance(run.task, ImageClassification)
    classes = run.task.class_count()
    return classes if run.task.classes == "all" else min(classes, run.trainer.batch_size)


def _of_classes(task: ImageClassification, count: int) -> ImageClassification:
    return replace(task, classes="all", class_names=[f"class {number}" for number in range(count)])
