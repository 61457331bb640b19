"""What steps on a device wait for, how long they take and what memory, and what the planner makes of it."""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn

from randlora.analysis import plan_choice
from randlora.analysis.calibration import calibrate
from randlora.analysis.device.place import Check, Place, in_processes, own_compiler_cache
from randlora.analysis.device.report import Figures, Listed, Wrong, within
from randlora.analysis.device.runs import OF_METHOD, SMALL
from randlora.analysis.device.updates import ATTENTION
from randlora.analysis.layer_speed import VARIANTS, Trial
from randlora.analysis.step_memory import peak_bytes
from randlora.analysis.step_speed import loop, our_step
from randlora.analysis.timing import device_seconds_of, interleaved
from randlora.analysis.workloads import WORKLOADS, Block, Workload
from randlora.config import CONFIGS, settings
from randlora.experiment import Experiment
from randlora.plan import memory_plan
from randlora.training.compilation import CompiledBlocks


def without_waiting(place: Place) -> Figures:
    """The trainer's third step of every method, which does not log, under torch's sync debug mode ``error``."""
    place.needs_cuda()
    figures = {}
    for path in sorted((CONFIGS / "method").glob("*.yaml")):
        how = (f"method={path.stem}", *OF_METHOD.get(path.stem, ()))
        experiment = Experiment.from_config(settings(*SMALL, *how, "trainer.log_every=100"))
        backbone = experiment.model.load()
        splits = experiment.task.splits(backbone, experiment.budget)
        experiment = experiment.calibrated(backbone, splits, experiment.trainer.accelerator())
        experiment.adapt(backbone)
        step = our_step(loop(experiment, experiment.bind(backbone), splits, 6, workers=0))
        step(), step()  # makes the optimiser's state
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
            figures[path.stem] = 0.0
        except RuntimeError as waited:
            figures[path.stem] = 1.0
            reason = f"{path.stem}: {waited}".splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    if any(figures.values()):
        raise Wrong(reason, figures)
    return figures


def plans_memory(runs: Mapping[str, Sequence[str]], large: bool = False) -> Check:
    """The check of steps by their settings, under a name each; `large` ones are for a card alone."""

    def check(place: Place) -> Figures:
        """A step's peak over its planned memory; at most 1.1 on a GPU, without a limit on a CPU."""
        place.needs_time()
        if large:
            place.needs_cuda()
        figures = Listed()
        for name, overrides in runs.items():
            if place.device.type == "cuda":
                plan, peak = _plan_and_peak(overrides)
            else:
                plan, peak = _elsewhere(overrides)
            figures[f"{name}, GiB"], figures[f"{name}, of the plan"] = peak / 2**30, peak / plan
        if place.device.type == "cuda":
            within({name: ratio for name, ratio in figures.items() if name.endswith("plan")}, 1.1)
        return figures

    return check


def _plan_and_peak(overrides: Sequence[str]) -> tuple[int, int]:
    experiment = Experiment.from_config(settings(*overrides, "dry_run=true"))  # which asks for no data
    plan = memory_plan(experiment)
    assert plan is not None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return plan["total"], peak_bytes(experiment)


def _elsewhere(overrides: Sequence[str]) -> tuple[int, int]:
    """In a process of its own, whose allocator gives freed memory back at once."""
    with tempfile.TemporaryDirectory() as folder:
        file, small = Path(folder) / "bytes", str(2**16)
        quick = {"MALLOC_MMAP_THRESHOLD_": small, "MALLOC_TRIM_THRESHOLD_": small}
        (code,) = in_processes(_note_peak, [(file, [*overrides, "trainer.device=cpu"])], [quick])
        if code:
            raise Wrong(f"{' '.join(overrides)}: the process ended with {code}", {})
        plan, peak = map(int, file.read_text().split())
        return plan, peak


def _note_peak(file: Path, overrides: Sequence[str]) -> None:
    file.write_text("{} {}".format(*_plan_and_peak(overrides)))


def chosen_plans(place: Place) -> Figures:
    """The time of the execution plan that RandLoRA chooses over that of the fastest of eight; at most 1.1 on a card.

    On a CPU of the benchmark's layers of 64 tokens alone: all take half an hour.
    """
    place.needs_time()
    cuda = place.device.type == "cuda"
    chosen = {name: load for name, load in WORKLOADS.items() if cuda or name.endswith("_t64")}
    found = plan_choice.choices(chosen, 15 if cuda else 5, place.device)
    figures = {
        f"{c.setting}, {c.layer.out_features} × {c.layer.in_features}, {c.layer.tokens} tokens": c.regret for c in found
    }
    return within(figures, 1.1) if cuda else figures


def constants(place: Place) -> Figures:
    """What `scripts/calibrate.py` would write for this device."""
    place.needs_time()
    return Listed(calibrate(place.device))


def _blocks(count: int, width: int, heads: int, mlp: int, shape: tuple[int, ...], kv_width: int = 0) -> Workload:
    make = partial(Block, width, heads, mlp, kv_width, gated=bool(kv_width))
    names = [*ATTENTION, "*.up", "*.down", *(["*.gate"] if kv_width else [])]
    return Workload(lambda: nn.Sequential(*(make() for _ in range(count))), names, shape, tuple(ATTENTION))


SIZES = {
    "ViT-B/32": _blocks(12, 768, 12, 3072, (64, 50, 768)),
    "ViT-L/14": _blocks(24, 1024, 16, 4096, (16, 257, 1024)),
    "LLaMA-like 1B": _blocks(16, 2048, 32, 8192, (1, 4096, 2048), kv_width=512),
}
COMPARED = (
    "lora",
    "lora_compiled",
    "randlora",
    "randlora_compiled",
    "randlora_kronecker",
    "peft_lora",
    "peft_randlora",
)


def step_times(workload: Workload) -> Check:
    """The check of a step of these blocks."""

    def check(place: Place) -> Figures:
        """Steps under bfloat16 autocast, without a limit: ms, MiB, and ratios to LoRA's step and PEFT's."""
        place.needs_cuda()
        with own_compiler_cache():
            return measured(workload, place.device, COMPARED, rounds=9)

    return check


def measured(workload: Workload, device: torch.device, names: Sequence[str], rounds: int) -> Listed:
    """Medians of steps in turns, in ms, the peak of one, in MiB, and the ratios to LoRA and to PEFT's RandLoRA."""
    trials = {name: Trial(workload, VARIANTS[name], device) for name in names if name in VARIANTS}

    def step(name: str) -> None:
        blocks = compilations.get(name, nullcontext())
        with torch.autocast(device.type, torch.bfloat16), blocks:
            trials[name].step()

    compilations = {
        name: CompiledBlocks(nn.Sequential(trial.model)) for name, trial in trials.items() if VARIANTS[name].compiled
    }
    calls = {name: partial(device_seconds_of, partial(step, name), device) for name in trials}
    seconds = {name: statistics.median(values) for name, values in interleaved(calls, rounds, warm_up=3).items()}
    figures = Listed({f"{name}, ms": 1e3 * value for name, value in seconds.items()})
    for name, trial in trials.items():
        with torch.autocast(device.type, torch.bfloat16), compilations.get(name, nullcontext()):
            figures[f"{name}, MiB"] = trial.peak_bytes() / 2**20
    for name, other in (("randlora", "lora"), ("peft_randlora", "randlora"), ("peft_lora", "lora_compiled")):
        if name in seconds and other in seconds:
            figures[f"{name} / {other}"] = seconds[name] / seconds[other]
    return figures


RUNS = {
    "clip_tiny": ("model=clip_tiny", "task=digits"),
    "clip_tiny, LoRA": ("model=clip_tiny", "task=digits", "method=lora"),
    "clip_tiny, full": ("model=clip_tiny", "task=digits", "method=full"),
}
LARGE = {
    "CLIP H/14, 128 images": (
        "experiment=clip_h14/randlora", "task=cifar10", "model.pretrained=null", "trainer.micro_batch_size=128",
    ),
    "LLaMA-3-8B, bf16": ("experiment=llama3_8b/randlora_30", "model.weights=null"),
    "LLaMA-3-8B, int8": ("experiment=llama3_8b/randlora_30", "model.weights=null", "model.quantization=int8"),
    "LLaMA-3-8B, NF4": ("experiment=llama3_8b/randlora_30", "model.weights=null", "model.quantization=nf4"),
}  # fmt: skip
