"""Step time and memory of the methods beside their peers, in one process.

python scripts/benchmark.py                                all workloads, every method, PEFT's beside ours
python scripts/benchmark.py vit_b16 --json figures.json    one workload, and a file of its figures
python scripts/benchmark.py linear_768x768_t64 --only frozen,lora,randlora
python scripts/benchmark.py --show figures.json            the tables of such a file, in Markdown

A step is forward, backward (with the gradient of the input, as inside a network) and AdamW. Variants take turns, round
by round, so that what disturbs the machine disturbs all of them. A figure is the median of the rounds, in CPU time with
one thread (in the device's time with CUDA); only ratios carry over to other machines. PEFT is optional.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import randlora
from randlora.adapters.core import cached, unload
from randlora.adapters.interface import Method
from randlora.bases import Basis
from randlora.methods import FullFineTuning, LoRA, NoLA, RandLoRA, VeRA
from randlora.records.memory import PeakMemory

try:
    import peft
except ImportError:
    peft = None  # type: ignore[assignment]

MIB = 2**20
OPEN = contextlib.ExitStack()  # what variants keep open while they are measured
RANK = 6  # of RandLoRA, as in the paper's B/32 runs


class Block(nn.Module):
    """A transformer block: x (batch, length, width) to the same; gated MLP and grouped keys as in LLaMA if asked."""

    def __init__(self, width: int, heads: int, mlp: int, kv_width: int = 0, gated: bool = False):
        super().__init__()
        self.heads, kv_width = heads, kv_width or width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, kv_width), nn.Linear(width, kv_width)
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.gate = nn.Linear(width, mlp) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        h, size = self.norm1(x), x.shape[-1] // self.heads
        q, k, v = (p(h).unflatten(-1, (-1, size)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.gelu(self.up(h)) if self.gate is None else F.silu(self.gate(h)) * self.up(h))


class Workload(NamedTuple):
    """What is timed: a model, the modules to adapt in it, and the shape of its input."""

    build: Callable[[], nn.Module]
    targets: list[str]
    shape: tuple[int, ...]


ATTENTION, MLP = ["*.q", "*.k", "*.v", "*.out"], ["*.up", "*.down"]


def _blocks(count: int, shape: tuple[int, ...], **sizes: Any) -> Workload:
    targets = ATTENTION + MLP + (["*.gate"] if sizes.get("gated") else [])
    return Workload(lambda: nn.Sequential(*(Block(**sizes) for _ in range(count))), targets, shape)


VIT = {"width": 768, "heads": 12, "mlp": 3072}
LLAMA = {"width": 896, "heads": 14, "mlp": 4864, "kv_width": 128, "gated": True}
WORKLOADS = {
    f"linear_{out}x{into}_t{tokens}": Workload(
        lambda out=out, into=into: nn.Sequential(nn.Linear(into, out)),  # type: ignore[misc]
        ["0"],
        (tokens, into),
    )
    for out, into in ((768, 768), (3072, 768), (768, 3072))
    for tokens in (64, 512, 2048)
} | {
    "vit_b16": _blocks(2, (16, 50, 768), **VIT),
    "vit_b32": _blocks(2, (32, 50, 768), **VIT),
    "vit_12_blocks_b16": _blocks(12, (16, 50, 768), **VIT),
    "llama_t512": _blocks(1, (1, 512, 896), **LLAMA),
    "llama_t2048": _blocks(1, (4, 512, 896), **LLAMA),
}


def ours(method: Callable[[nn.Module, list[str]], Method]) -> Callable[[nn.Module, list[str]], nn.Module]:
    """A variant that adapts the model by one of our methods."""

    def build(model: nn.Module, targets: list[str]) -> nn.Module:
        randlora.adapt(model, method(model, targets), targets)
        return model

    return build


def kept(method: Method) -> Callable[[nn.Module, list[str]], nn.Module]:
    """A variant inside `cached`: W' is kept from forward to backward."""

    def build(model: nn.Module, targets: list[str]) -> nn.Module:
        randlora.adapt(model, method, targets)
        OPEN.enter_context(cached(model))
        return model

    return build


def theirs(config: str, **settings: Any) -> Callable[[nn.Module, list[str]], nn.Module]:
    """A variant that adapts the model by PEFT."""

    def build(model: nn.Module, targets: list[str]) -> nn.Module:
        names = sorted({target.rpartition(".")[2] for target in targets})
        given = settings if "r" in settings else settings | {"r": lora_rank(model, targets)}
        return peft.get_peft_model(model, getattr(peft, config)(target_modules=names, **given))

    return build


def frozen(model: nn.Module, targets: list[str]) -> nn.Module:
    """The floor: nothing is trained."""
    return model.requires_grad_(False)


def lora_rank(model: nn.Module, targets: list[str]) -> int:
    """The rank at which LoRA trains as many numbers as RandLoRA does."""
    report = randlora.adapt(model, RandLoRA(rank=RANK), targets)
    unload(model)
    return round(report.trainable_parameters / sum(s.out_features + s.in_features for s in report.sites))


VARIANTS: dict[str, Callable[[nn.Module, list[str]], nn.Module]] = {
    "frozen": frozen,
    "full": ours(lambda model, targets: FullFineTuning(train="targets")),
    "lora": ours(lambda model, targets: LoRA(rank=lora_rank(model, targets))),
    "randlora": ours(lambda model, targets: RandLoRA(rank=RANK)),
    "randlora_bf16": ours(lambda model, targets: RandLoRA(rank=RANK, delta_dtype="bfloat16")),
    "randlora_cached": kept(RandLoRA(rank=RANK)),
    "randlora_kronecker": ours(lambda model, targets: RandLoRA(rank=RANK, basis="kronecker")),
    "randlora_kronecker_bf16": ours(
        lambda model, targets: RandLoRA(rank=RANK, basis="kronecker", delta_dtype="bfloat16")
    ),
    "vera": ours(lambda model, targets: VeRA(rank=1024)),
    "vera_kronecker": ours(lambda model, targets: VeRA(rank=1024, basis="kronecker")),
    "nola": ours(lambda model, targets: NoLA(rank=1, num_bases=1024)),
    "nola_kronecker": ours(lambda model, targets: NoLA(rank=1, num_bases=1024, basis="kronecker")),
}
PEFTS = {
    "peft_lora": theirs("LoraConfig"),
    "peft_vera": theirs("VeraConfig", r=1024),
    "peft_randlora": theirs("RandLoraConfig", r=RANK, randlora_alpha=2 * RANK),
}


class Trial:
    """A model under one variant, ready to be stepped."""

    def __init__(self, workload: Workload, adapt: Callable[[nn.Module, list[str]], nn.Module], device: torch.device):
        torch.manual_seed(0)
        self.model = adapt(workload.build().to(device), workload.targets)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=1e-4) if self.trained else None
        self.x = torch.randn(workload.shape, device=device).requires_grad_(True)
        self.gradient = torch.randn_like(self.model(self.x))

    def step(self) -> None:
        """Forward, backward and the optimiser's step."""
        self.model(self.x).backward(self.gradient)
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad()
        self.x.grad = None

    def saved_bytes(self) -> int:
        """What autograd keeps between forward and backward, beside parameters, buffers and the input."""
        held = [*self.model.parameters(), *self.model.buffers(), self.x]
        known = {tensor.untyped_storage().data_ptr() for tensor in held}
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = self.model(self.x)
        del y
        return sum(saved.values())

    def peak_bytes(self) -> int:
        """The most memory held during a step above what was held before it."""
        gc.collect()
        if self.x.is_cuda:
            start = torch.cuda.memory_allocated()
        else:
            if platform.system() == "Linux":
                ctypes.CDLL("libc.so.6").malloc_trim(0)
            start = _resident_bytes()
        peak = PeakMemory(self.x.device)
        self.step()
        return max(0, peak.bytes() - start)

    def basis_bytes(self) -> int:
        """Of the fixed matrices, each counted once."""
        if peft is not None and isinstance(self.model, peft.PeftModel):
            found = [b for name, b in self.model.named_buffers() if any(w in name for w in ("randlora_", "vera_"))]
        else:
            found = [b for m in self.model.modules() if isinstance(m, Basis) for b in m.buffers()]
        storages = {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in found}
        return sum(storages.values())

    def file_bytes(self) -> int:
        """Of the adapter as each library saves it by default."""
        if not self.trained:
            return 0
        with tempfile.TemporaryDirectory() as folder:
            if peft is not None and isinstance(self.model, peft.PeftModel):
                self.model.save_pretrained(folder)
                return sum(f.stat().st_size for f in Path(folder).iterdir() if f.name.startswith("adapter"))
            return randlora.save_adapter(self.model, folder)

    @torch.no_grad()
    def evaluate(self) -> None:
        """A forward pass as an evaluation would do it: ours merged, PEFT's as it is."""
        self.model(self.x)


def _resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def timed(device: torch.device, call: Callable[[], None]) -> float:
    """Seconds of CPU time, or of the device's with CUDA."""
    if device.type != "cuda":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def interleaved(device: torch.device, calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """The median seconds of each call, all of them once in every round, after two rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            taken = timed(device, call)
            if number >= 2:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(workload: Workload, names: Sequence[str], rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Figures by variant."""
    everything = VARIANTS | (PEFTS if peft is not None else {})
    trials = {name: Trial(workload, everything[name], device) for name in names}
    steps = interleaved(device, {name: trial.step for name, trial in trials.items()}, rounds)
    figures = {}
    for name, trial in trials.items():
        figures[name] = {
            "trained": sum(p.numel() for p in trial.trained),
            "step_seconds": steps[name],
            "saved_bytes": trial.saved_bytes(),
            "peak_bytes": trial.peak_bytes(),
            "basis_bytes": trial.basis_bytes(),
            "file_bytes": trial.file_bytes(),
        }
    with contextlib.ExitStack() as merging:
        for name, trial in trials.items():
            if name in VARIANTS:
                merging.enter_context(randlora.merged(trial.model))
        forward = interleaved(device, {name: trial.evaluate for name, trial in trials.items()}, rounds)
    OPEN.close()
    for name in trials:
        figures[name]["evaluation_seconds"] = forward[name]
    return figures


COLUMNS = (
    "trained",
    "ms",
    "× frozen",
    "× LoRA",
    "PEFT / this",
    "saved",
    "peak",
    "bases",
    "file",
    "evaluation × frozen",
)


def rows(figures: dict[str, dict[str, float]]) -> list[list[str]]:
    """A table's cells, the variants in order; sizes in MiB, ratios of step times."""

    def ratio(name: str, to: str, key: str = "step_seconds") -> str:
        return f"{figures[name][key] / figures[to][key]:.2f}" if to in figures else ""

    return [
        [
            name,
            f"{figure['trained']:,}",
            f"{1e3 * figure['step_seconds']:.1f}",
            ratio(name, "frozen"),
            ratio(name, "lora"),
            f"{figures['peft_randlora']['step_seconds'] / figure['step_seconds']:.2f}"
            if "peft_randlora" in figures
            else "",
            *(f"{figure[key] / MIB:.2f}" for key in ("saved_bytes", "peak_bytes", "basis_bytes", "file_bytes")),
            ratio(name, "frozen", "evaluation_seconds"),
        ]
        for name, figure in figures.items()
    ]


def markdown(figures: dict[str, dict[str, float]]) -> str:
    """The table; sizes in MiB."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows(figures)])


def tables(made: dict[str, Any]) -> str:
    """All of a file's figures in Markdown."""
    return "\n\n".join(f"{name}\n\n{markdown(figures)}" for name, figures in made["workloads"].items())


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*VARIANTS, *(PEFTS if peft is not None else {})]
    parser.add_argument("workloads", nargs="*", metavar="workload", help=f"of {', '.join(WORKLOADS)}; all if none")
    parser.add_argument("--only", default=",".join(known), help="variants, with commas; of %(default)s")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the figures; workloads that it has already are kept")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing, print the tables of such a file")
    options = parser.parse_args(arguments)
    if options.show is not None:
        print(tables(json.loads(options.show.read_text())))
        return
    names = options.only.split(",")
    for given, allowed in ((options.workloads, WORKLOADS), (names, known)):
        for name in given:
            if name not in allowed:
                parser.error(f"{name!r} is not one of {', '.join(allowed)}")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    made: dict[str, Any] = {
        "machine": machine,
        "threads": options.threads,
        "rounds": {},
        "versions": {"torch": torch.__version__, "peft": peft.__version__ if peft is not None else None},
        "workloads": {},
    }
    if options.json is not None and options.json.exists():
        before = json.loads(options.json.read_text())
        made |= {key: before[key] for key in ("rounds", "workloads")}
    for name in options.workloads or WORKLOADS:
        figures = measure(WORKLOADS[name], names, options.rounds, device)
        made["rounds"][name], made["workloads"][name] = options.rounds, figures
        print("\n" + tables({"workloads": {name: figures}}), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(made, indent=1) + "\n")
        gc.collect()


if __name__ == "__main__":
    main(sys.argv[1:])
