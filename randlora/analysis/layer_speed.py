"""Step time and memory of the methods' layers beside their peers, in one process.

A step is forward, backward (with the gradient of the input, as inside a network) and AdamW. Variants take turns, round
by round. A figure is the median of the rounds, in CPU time (in the device's time with CUDA); only ratios carry over to
other machines. PEFT is optional.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import nn

from randlora.adapters import adapt, cached, merged, save_adapter, unload
from randlora.adapters.core import require_adaptation
from randlora.adapters.interface import Step
from randlora.analysis.timing import device_seconds_of, interleaved
from randlora.analysis.workloads import Workload
from randlora.bases import Basis
from randlora.budget import matched, parameters
from randlora.methods import (
    DoRA,
    EDoRA,
    FlatLoRA,
    FullFineTuning,
    IncreLoRA,
    LoRA,
    LoRAMini,
    LoRTA,
    MELoRA,
    Method,
    MoRA,
    NoLA,
    RandLoRA,
    SoRA,
    VeRA,
)
from randlora.plan import saved
from randlora.records.memory import PeakMemory
from randlora.studies.tables import markdown
from randlora.training.compilation import CompiledBlocks

try:
    import peft
except ImportError:
    peft = None  # type: ignore[assignment]

RANK = 6  # of RandLoRA, as in the paper's B/32 runs
Figures = dict[str, dict[str, float]]  # by variant and measure


class Variant(NamedTuple):
    """A way to adapt a workload's model: `build` gives the model to be stepped, from the model and its workload."""

    build: Callable[[nn.Module, Workload], nn.Module]
    cached: bool = False  # stepped inside `cached`: W' is kept from forward to backward
    compiled: bool = False  # stepped with its blocks compiled; left out where a workload has not several
    ours: bool = True  # whether it is evaluated inside `merged`
    attention_only: bool = False  # adapts the workload's `attention`, and is left out where there is none


def _adapted(method: Method, model: nn.Module, workload: Workload) -> nn.Module:
    adapt(model, method, workload.targets)
    return model


def _ours(method: Method, cached: bool = False, compiled: bool = False) -> Variant:
    return Variant(partial(_adapted, method), cached, compiled)


def _peft(config: str, **settings: int) -> Variant:
    def build(model: nn.Module, workload: Workload) -> nn.Module:
        names = sorted({target.rpartition(".")[2] for target in workload.targets})
        rank = settings.get("r") or lora_rank(model, workload.targets)
        return peft.get_peft_model(model, getattr(peft, config)(target_modules=names, **settings | {"r": rank}))

    return Variant(build, ours=False)


def _at_loras_count(method: Method, attention_only: bool = False) -> Variant:
    """The method with as many parameters as `lora` has, as near as its setting comes; within a step of training.

    At LLaMA's block, whose keys and values are narrow, EDoRA and MoRA have fewer: their rank is bounded by these.
    """

    def build(model: nn.Module, workload: Workload) -> nn.Module:
        target = parameters(model, LoRA(rank=lora_rank(model, workload.targets)), workload.targets)
        targets = workload.attention if attention_only else workload.targets
        sized = matched(model, method, targets, target).method
        adapt(model, sized.grown(), targets)
        sized.before_step(require_adaptation(model).updates.values(), Step(1, 2, 1e-4, 0))  # noise, where there is some
        return model

    return Variant(build, attention_only=attention_only)


def lora_rank(model: nn.Module, targets: Sequence[str]) -> int:
    """The rank at which LoRA trains as many parameters as RandLoRA does."""
    report = adapt(model, RandLoRA(rank=RANK), targets)
    unload(model)
    return round(report.trainable_parameters / sum(s.out_features + s.in_features for s in report.sites))


def _lora(model: nn.Module, workload: Workload) -> nn.Module:
    return _adapted(LoRA(rank=lora_rank(model, workload.targets)), model, workload)


VARIANTS = {
    "frozen": Variant(lambda model, _: model.requires_grad_(False)),  # the floor: nothing is trained
    "full": _ours(FullFineTuning(train="targets")),
    "lora": Variant(_lora),
    "lora_compiled": Variant(_lora, compiled=True),
    "randlora": _ours(RandLoRA(rank=RANK)),
    "randlora_compiled": _ours(RandLoRA(rank=RANK), compiled=True),
    "randlora_bf16": _ours(RandLoRA(rank=RANK, delta_dtype="bfloat16")),
    "randlora_cached": _ours(RandLoRA(rank=RANK), cached=True),
    "randlora_kronecker": _ours(RandLoRA(rank=RANK, basis="kronecker")),
    "randlora_kronecker_bf16": _ours(RandLoRA(rank=RANK, basis="kronecker", delta_dtype="bfloat16")),
    "randlora_kronecker_compiled": _ours(RandLoRA(rank=RANK, basis="kronecker"), compiled=True),
    "vera": _ours(VeRA(rank=1024)),
    "vera_kronecker": _ours(VeRA(rank=1024, basis="kronecker")),
    "nola": _ours(NoLA(rank=1, num_bases=1024)),
    "dora": _at_loras_count(DoRA()),
    "edora": _at_loras_count(EDoRA()),
    "mora": _at_loras_count(MoRA()),
    "mora_sharing": _at_loras_count(MoRA(compression="sharing")),
    "melora": _at_loras_count(MELoRA()),
    "loramini": _at_loras_count(LoRAMini(inner_in=256, inner_out=256)),  # the rank is no larger than these
    "lorta": _at_loras_count(LoRTA(), attention_only=True),
    "sora": _at_loras_count(SoRA()),
    "increlora": _at_loras_count(IncreLoRA()),
    "flatlora": _at_loras_count(FlatLoRA()),
    "nola_kronecker": _ours(NoLA(rank=1, num_bases=1024, basis="kronecker")),
}
if peft is not None:
    VARIANTS |= {
        "peft_lora": _peft("LoraConfig"),
        "peft_vera": _peft("VeraConfig", r=1024),
        "peft_randlora": _peft("RandLoraConfig", r=RANK, randlora_alpha=2 * RANK),
    }


class Trial:
    """A model under one variant, ready to be stepped."""

    def __init__(self, workload: Workload, variant: Variant, device: torch.device):
        torch.manual_seed(0)
        self.model = variant.build(workload.build().to(device), workload)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4) if self.trained else None
        self.x = torch.randn(workload.shape, device=device).requires_grad_(True)
        self.gradient = torch.randn_like(self.model(self.x))
        self.peft = peft is not None and isinstance(self.model, peft.PeftModel)

    def step(self) -> None:
        """Forward, backward and the optimiser's step."""
        self.model(self.x).backward(self.gradient)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.x.grad = None

    @torch.no_grad()
    def evaluate(self) -> None:
        """A forward pass as an evaluation would do it: ours merged, PEFT's as it is."""
        self.model(self.x)

    def saved_bytes(self) -> int:
        """What autograd keeps between forward and backward, beside parameters, buffers and the input."""
        return sum(saved(self.model, lambda: self.model(self.x), [self.x]))

    def peak_bytes(self) -> int:
        """The most memory held during a step above what was held before it."""
        gc.collect()
        if self.x.is_cuda:
            start = torch.cuda.memory_allocated()
        else:
            if platform.system() == "Linux":
                ctypes.CDLL("libc.so.6").malloc_trim(0)
            start = psutil.Process().memory_info().rss
        peak = PeakMemory(self.x.device)
        self.step()
        return max(0, peak.bytes() - start)

    def basis_bytes(self) -> int:
        """Of the fixed matrices, each counted once."""
        if self.peft:
            buffers = [b for name, b in self.model.named_buffers() if "randlora_" in name or "vera_" in name]
        else:
            buffers = [b for module in self.model.modules() if isinstance(module, Basis) for b in module.buffers()]
        return sum({b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in buffers}.values())

    def file_bytes(self) -> int:
        """Of the adapter as each library saves it by default."""
        if not self.trained:
            return 0
        with tempfile.TemporaryDirectory() as folder:
            if self.peft:
                self.model.save_pretrained(folder)
                return sum(f.stat().st_size for f in Path(folder).iterdir() if f.name.startswith("adapter"))
            return save_adapter(self.model, folder)


def measure(workload: Workload, names: Sequence[str], rounds: int, device: torch.device) -> Figures:
    """Trained parameters, seconds and bytes of the variants of these `names`; medians over the rounds."""

    def medians(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        timed = {name: partial(device_seconds_of, call, device) for name, call in calls.items()}
        return {name: statistics.median(seconds) for name, seconds in interleaved(timed, rounds, warm_up=2).items()}

    with torch.device("meta"):
        several = len([*workload.build().children()]) > 1
    names = [name for name in names if workload.attention or not VARIANTS[name].attention_only]
    names = [name for name in names if several or not VARIANTS[name].compiled]
    trials = {name: Trial(workload, VARIANTS[name], device) for name in names}
    with ExitStack() as contexts, ExitStack() as compilations:
        for name, trial in trials.items():
            if VARIANTS[name].cached:
                contexts.enter_context(cached(trial.model))
            if VARIANTS[name].compiled:
                compilations.enter_context(CompiledBlocks(nn.Sequential(trial.model)))
        step_seconds = medians({name: trial.step for name, trial in trials.items()})
        figures: Figures = {
            name: {
                "trained": sum(p.numel() for p in trial.trained),
                "step_seconds": step_seconds[name],
                "saved_bytes": trial.saved_bytes(),
                "peak_bytes": trial.peak_bytes(),
                "basis_bytes": trial.basis_bytes(),
                "file_bytes": trial.file_bytes(),
            }
            for name, trial in trials.items()
        }
        compilations.close()  # scores are taken without
        for name, trial in trials.items():
            if VARIANTS[name].ours:
                contexts.enter_context(merged(trial.model))
        forward_seconds = medians({name: trial.evaluate for name, trial in trials.items()})
    for name in trials:
        figures[name]["evaluation_seconds"] = forward_seconds[name]
    return figures


COLUMNS = (
    "variant", "trained", "ms", "× frozen", "× LoRA", "PEFT / this", "saved", "peak", "bases", "file",
    "evaluation × frozen",
)  # fmt: skip


def table(figures: Figures) -> str:
    """The variants in order as a Markdown table; sizes in MiB, ratios of step times."""

    def ratio(name: str, to: str, key: str = "step_seconds") -> str:
        return f"{figures[name][key] / figures[to][key]:.2f}" if name in figures and to in figures else ""

    rows = [
        [
            name, f"{figure['trained']:,}", f"{1e3 * figure['step_seconds']:.1f}",
            ratio(name, "frozen"), ratio(name, "lora"), ratio("peft_randlora", name),
            *(f"{figure[key] / 2**20:.2f}" for key in ("saved_bytes", "peak_bytes", "basis_bytes", "file_bytes")),
            ratio(name, "frozen", "evaluation_seconds"),
        ]
        for name, figure in figures.items()
    ]  # fmt: skip
    return markdown(COLUMNS, rows)
