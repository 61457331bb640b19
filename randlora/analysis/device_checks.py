"""What must hold on a device, check by check: exact updates, exact runs, no waiting, and its times and peaks.

Errors are ‖found − expected‖ / ‖expected‖ (Frobenius, in float64). `scripts/gpu.py` runs `CHECKS` in their order.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import itertools
import math
import multiprocessing
import os
import signal
import socket
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from randlora.adapters import adapt, cached, load_adapter, merge, merged, save_adapter
from randlora.adapters.core import adapted_layers, require_adaptation
from randlora.adapters.interface import Step
from randlora.adapters.quantization import dense, quantise, quantised_maps
from randlora.analysis import plan_choice
from randlora.analysis.calibration import calibrate
from randlora.analysis.device_report import Figures, Listed, NotHere, Wrong, within
from randlora.analysis.layer_speed import VARIANTS, Trial
from randlora.analysis.step_memory import peak_bytes
from randlora.analysis.step_speed import loop, our_step
from randlora.analysis.timing import device_seconds_of, interleaved
from randlora.analysis.workloads import WORKLOADS, Block, Workload
from randlora.config import CONFIGS, settings
from randlora.errors import FINISHED, SettingsError
from randlora.experiment import Experiment
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
    RandLoRAa,
    SoRA,
    VeRA,
)
from randlora.plan import memory_plan
from randlora.run import run
from randlora.training.compilation import CompiledBlocks
from randlora.training.loop import Loop


class Place(NamedTuple):
    """Where checks are done.

    Args:
        device: That they are about.
        tiny: Whether to do with two methods, and without what takes more than a second or two.
    """

    device: torch.device
    tiny: bool = False

    @property
    def methods(self) -> Mapping[str, Method]:
        return {name: METHODS[name] for name in ("lora", "randlora")} if self.tiny else METHODS

    def needs_cuda(self) -> None:
        """Raises NotHere on a CPU."""
        if self.device.type != "cuda":
            raise NotHere("needs a CUDA device")

    def needs_time(self) -> None:
        """Raises NotHere at tiny size."""
        if self.tiny:
            raise NotHere("left out at tiny size")


Check = Callable[[Place], Figures]
WIDTH = 128  # int4 has groups of 128 weights
ATTENTION = ["*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj"]
METHODS: Mapping[str, Method] = {
    "lora": LoRA(rank=4),
    "dora": DoRA(rank=4),
    "vera": VeRA(rank=16),
    "nola": NoLA(num_bases=32, rank=2),
    "randlora": RandLoRA(rank=6),
    "randlora_kronecker": RandLoRA(rank=6, basis="kronecker"),
    "randlora_ternary": RandLoRA(rank=6, basis="ternary"),
    "randlora_a": RandLoRAa(rank=6),
    "full": FullFineTuning(train="targets"),
    "edora": EDoRA(rank=4),
    "mora": MoRA(rank=4),
    "melora": MELoRA(rank=2, parts=4),
    "loramini": LoRAMini(rank=3, inner_in=8, inner_out=6),
    "lorta": LoRTA(rank=4),
    "flatlora": FlatLoRA(rank=4),
    "sora": SoRA(rank=4),
    "increlora": IncreLoRA(rank=4, start=3),
}


def model(device: torch.device) -> nn.Sequential:
    """Two blocks with square, tall and wide maps, the same whenever it is asked for."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(WIDTH, heads=4, mlp=2 * WIDTH) for _ in range(2))).to(device)


def adapted(device: torch.device, method: Method) -> nn.Sequential:
    """That model under a method, with what is trained moved away from its start, where most updates are zero."""
    net = model(device)
    adapt(net, method, targets(method))
    _move(net)
    return net


def targets(method: Method) -> list[str]:
    return ATTENTION if isinstance(method, LoRTA) else [*ATTENTION, "*.up", "*.down"]


@torch.no_grad()
def _move(net: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.1)


def error(found: Tensor | None, expected: Tensor | None) -> float:
    """‖found − expected‖ / ‖expected‖; of a zero, the norm of what was found; infinite where one of two is missing."""
    if found is None or expected is None:
        return 0.0 if found is expected else math.inf
    expected = expected.detach().cpu().double()
    return float((found.detach().cpu().double() - expected).norm() / (expected.norm() or 1.0))


def largest(errors: Sequence[float]) -> float:
    """Of errors; no number where one of them is none, which max() may pass over."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)


# Exact updates


def layers(device: torch.device, method: Method, precision: AbstractContextManager[object]) -> float:
    """The largest error of adapted layers: outputs, gradients of the input and of every trained tensor.

    Oracle: F.linear with W0 + ΔW in float64 on the CPU, and autograd.
    """
    net, errors = adapted(device, method), []
    exact = copy.deepcopy(net).cpu().double()
    for layer, oracle in zip(adapted_layers(net).values(), adapted_layers(exact).values(), strict=True):
        for rows, update, true_rows, true in zip(layer.rows, layer.updates, oracle.rows, oracle.updates, strict=True):
            x_true = torch.randn(64, layer.in_features, dtype=torch.float64, requires_grad=True)
            x = x_true.detach().to(device, torch.float32).requires_grad_()
            with precision:
                y = update(x, layer.frozen(rows))
            base = oracle.frozen(true_rows)
            y_true = F.linear(x_true, base.weight + true.delta(base.weight), base.bias)
            g = torch.randn_like(y_true)
            ours = torch.autograd.grad(y, [x, *update.parameters()], g.to(y), allow_unused=True)
            theirs = torch.autograd.grad(y_true, [x_true, *true.parameters()], g, allow_unused=True)
            pairs = list(zip(ours, theirs, strict=True))
            # A single number may be a sum that nearly cancels, so those of a layer (IncreLoRA's) are one vector.
            single = [(a, b) for a, b in pairs if a is not None and b is not None and a.numel() == 1]
            pairs = [(a, b) for a, b in pairs if a is None or a.numel() > 1]
            if single:
                pairs.append((torch.cat([a.flatten() for a, _ in single]), torch.cat([b.flatten() for _, b in single])))
            errors += [error(y, y_true), *(error(a, b) for a, b in pairs)]
    return largest(errors)


def in_float32(place: Place) -> Figures:
    """Outputs, and gradients of inputs and trained tensors, beside float64 on the CPU; 1e-4: large sums lose digits."""
    return within({name: layers(place.device, method, nullcontext()) for name, method in place.methods.items()}, 1e-4)


def in_tf32(place: Place) -> Figures:
    """The same with tf32, whose products have ten bits; 5e-3."""
    place.needs_cuda()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = {name: layers(place.device, method, nullcontext()) for name, method in place.methods.items()}
    finally:
        torch.set_float32_matmul_precision(before)
    return within(found, 5e-3)


def in_bfloat16(place: Place) -> Figures:
    """The same under bfloat16 autocast, with eight bits; 5e-2."""
    precision = torch.autocast(place.device.type, torch.bfloat16)
    return within({name: layers(place.device, method, precision) for name, method in place.methods.items()}, 5e-2)


@torch.no_grad()
def one_output(place: Place) -> Figures:
    """A start that changes nothing, and one output whether merged, saved and loaded, or written in; 1e-4."""

    def errors(method: Method) -> Iterator[float]:
        net, x = model(place.device).eval(), torch.randn(2, 7, WIDTH, device=place.device)
        plain = net(x)
        adapt(net, method, targets(method))
        yield error(net(x), plain)
        _move(net)
        y = net(x)
        with merged(net):
            yield error(net(x), y)
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(net, folder)
            loaded = model(place.device).eval()
            load_adapter(loaded, folder)
        yield error(loaded(x), y)
        yield error(merge(net)(x), y)

    return within({name: largest([*errors(method)]) for name, method in place.methods.items()}, 1e-4)


def _gradients(net: nn.Module, forward: Callable[[Tensor], Tensor], times: int = 1) -> list[Tensor]:
    """The output and the gradients of the input and of what is trained, summed over so many times."""
    torch.manual_seed(2)
    device = next(net.parameters()).device
    x = torch.randn(2, 7, WIDTH).to(device).requires_grad_()
    trained = [x, *(p for p in net.parameters() if p.requires_grad)]
    for _ in range(times):
        y = forward(x)
        y.square().mean().backward()
    found = [y.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in trained)]
    net.zero_grad()
    return found


def kept_or_computed_again(place: Place) -> Figures:
    """Gradients of two passes in `cached` and with blocks computed again in backward, beside plain ones; 1e-5."""

    def again(net: nn.Sequential, x: Tensor) -> Tensor:
        for block in net:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    def worst(method: Method) -> float:
        net = adapted(place.device, method)
        expected = _gradients(net, net, 2)
        found = [_gradients(net, partial(again, net), 2)]
        with cached(net):
            found += [_gradients(net, net, 2), _gradients(net, partial(again, net), 2)]
        return largest([error(a, b) for way in found for a, b in zip(way, expected, strict=True)])

    return within({name: worst(method) for name, method in place.methods.items()}, 1e-5)


def compiled(place: Place) -> Figures:
    """Gradients of a training step whose blocks are compiled, beside one without; 1e-4. A third step compiles nothing.

    On a CPU a few methods: the compiler takes many seconds for each there.
    """
    place.needs_time()
    few = ("lora", "randlora", "randlora_kronecker")
    chosen = METHODS if place.device.type == "cuda" else {name: METHODS[name] for name in few}

    def worst(method: Method) -> float:
        torch._dynamo.reset()
        net = adapted(place.device, method)
        method.before_step(require_adaptation(net).updates.values(), Step(1, 9, 1e-4, 0))
        expected = _gradients(net, net)
        with CompiledBlocks(nn.Sequential(net)):
            _gradients(net, net), _gradients(net, net)
            with torch.compiler.set_stance("fail_on_recompile"):
                found = _gradients(net, net)
        return largest([error(a, b) for a, b in zip(found, expected, strict=True)])

    with _own_compiler_cache():
        return within({name: worst(method) for name, method in chosen.items()}, 1e-4)


@torch.no_grad()
def beside_peft(place: Place) -> Figures:
    """The output of PEFT's model with the adapter that `to_peft` writes; 1e-4."""
    place.needs_time()
    try:
        from peft import PeftModel
    except ImportError as missing:
        raise NotHere("the package peft is not installed") from missing
    from randlora.peft import to_peft

    figures = {}
    for name in ("lora", "dora", "vera", "randlora"):
        net, x = adapted(place.device, METHODS[name]).eval(), torch.randn(2, 7, WIDTH, device=place.device)
        with tempfile.TemporaryDirectory() as folder:
            to_peft(net, folder, bases=True)
            theirs = PeftModel.from_pretrained(model(place.device), folder).to(place.device).eval()
        figures[name] = error(net(x), theirs(x))
    return within(figures, 1e-4)


def on_quantised(bits: str, dtype: torch.dtype, limit: float) -> Check:
    """The check of a base of so many bits, whose numbers are of this dtype, to this limit."""

    @torch.no_grad()
    def check(place: Place) -> Figures:
        """Outputs on weights in few bits, beside those on the numbers that they stand for; 1e-4, int4 5e-2."""
        place.needs_time()
        figures = {}
        for name in ("lora", "dora", "vera", "randlora", "randlora_kronecker"):
            few, many = (model(place.device).to(dtype).eval() for _ in range(2))
            try:
                quantise(few, bits)
            except SettingsError as refused:
                raise NotHere(str(refused)) from refused
            for path in quantised_maps(few):
                numbers: Any = few.get_submodule(path).weight
                many.get_submodule(path).weight.data = dense(numbers, dtype)
            for net in (few, many):
                adapt(net, METHODS[name], targets(METHODS[name]))
                _move(net)
            x = torch.randn(2, 7, WIDTH, device=place.device, dtype=dtype)
            figures[name] = error(few(x), many(x))
        return within(figures, limit)

    return check


# Exact runs: the whole program, on a model and data that are embedded

SMALL = (
    "model=clip_tiny_vision", "task=digits", "shots=4", "task.validation_size=10", "task.test_size=20",
    "trainer.batch_size=8", "trainer.max_steps=6", "trainer.save_every=2", "trainer.precision=fp32",
)  # fmt: skip
OF_METHOD = {"lorta": ("targets=['*.attn.in_proj[q]','*.attn.in_proj[v]']",)}  # which wants parts of an attention
FEW = ("lora", "randlora", "full")  # where a method costs processes of its own


def _program(device_type: str, root: Path, *overrides: str) -> Path:
    """The folder of the adapter of a small run, by the program itself; raises Wrong where it does not end as it should.

    With deterministic algorithms, as a run must be that is to go on to the same bits.
    """
    where = f"trainer.device={'cpu' if device_type == 'cpu' else 'auto'}"
    experiment = Experiment.from_config(settings(*SMALL, where, f"run_root={root}", *overrides))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            outcome = run(experiment, "")
    finally:
        torch.use_deterministic_algorithms(before)
    if outcome.code != FINISHED and "trainer.stop_at" not in " ".join(overrides):
        raise Wrong(f"{experiment.method.name}: exit code {outcome.code}: {said.getvalue()[-300:]}", {})
    return experiment.folder / "adapter"


def _tensors(adapter: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(adapter.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _apart(one: Path, other: Path) -> float:
    """The largest error between two adapters' tensors; infinite where they have not the same ones."""
    found, expected = _tensors(one), _tensors(other)
    if not found or found.keys() != expected.keys():
        return math.inf
    return largest([error(found[name], expected[name]) for name in found])


def gone_on(place: Place) -> Figures:
    """Runs of six steps paused after three and gone on, beside undisturbed ones: the same bits."""
    place.needs_time()
    names = sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml"))

    def apart(name: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            at, how = Path(folder), (f"method={name}", *OF_METHOD.get(name, ()))
            whole = _program(place.device.type, at / "whole", *how)
            _program(place.device.type, at / "paused", *how, "trainer.stop_at=3")
            return _apart(_program(place.device.type, at / "paused", *how), whole)

    return within({name: apart(name) for name in names}, 0.0)


def killed(place: Place) -> Figures:
    """Runs killed in their fifth step (SIGKILL) and started again, beside undisturbed ones: the same bits."""
    place.needs_time()

    def apart(name: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            at, method = Path(folder), f"method={name}"
            whole = _program(place.device.type, at / "whole", method)
            (code,) = _in_processes(_until_killed, [(place.device.type, at / "killed", method)])
            if code != -signal.SIGKILL:
                raise Wrong(f"{name}: it was to be killed, and ended with {code}", {})
            if _tensors(at / "killed"):
                raise Wrong(f"{name}: it had finished before it was killed", {})
            return _apart(_program(place.device.type, at / "killed", method), whole)

    return within({name: apart(name) for name in FEW}, 0.0)


def _until_killed(device_type: str, root: Path, *overrides: str) -> None:
    step, seen = Loop.step, itertools.count()

    def doomed(self: Loop, at: Step) -> Any:
        if next(seen) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, at)

    Loop.step = doomed  # type: ignore[assignment, method-assign]
    _program(device_type, root, *overrides)


def two_processes(backend: str) -> Check:
    """The check of two processes by a backend of torch.distributed."""

    def check(place: Place) -> Figures:
        """Adapters of runs whose batches two processes share, beside those of one; 1e-4. NCCL has two devices."""
        place.needs_time()
        if backend == "nccl":
            place.needs_cuda()
            if torch.cuda.device_count() < 2:
                raise NotHere(f"needs two CUDA devices, and there is {torch.cuda.device_count()}")

        # AdamW's epsilon is large, so that a rounding error of a tiny gradient is none of a whole step.
        def apart(name: str) -> float:
            with tempfile.TemporaryDirectory() as folder:
                at, how = Path(folder), (f"method={name}", "+optimizer.eps=1e-3")
                one = _program(place.device.type, at / "one", *how)
                with socket.socket() as free:
                    free.bind(("127.0.0.1", 0))
                    port = str(free.getsockname()[1])
                common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                # Of one card both processes are the first: accelerate takes the local rank for the card's number.
                alone = backend == "gloo" and place.device.type == "cuda"
                ranks = [common | {"RANK": rank, "LOCAL_RANK": "0" if alone else rank} for rank in "01"]
                arguments = (backend, place.device.type, at / "two", *how)
                codes = _in_processes(_as_one_of_two, [arguments] * 2, ranks)
                if codes != [0, 0]:
                    raise Wrong(f"{name}: the processes ended with {codes}", {})
                return _apart(next((at / "two").rglob("adapter")), one)

        return within({name: apart(name) for name in FEW}, 1e-4)

    return check


def _as_one_of_two(backend: str, device_type: str, root: Path, *overrides: str) -> None:
    from accelerate import PartialState

    PartialState(
        cpu=device_type == "cpu", backend=backend
    )  # before the trainer makes one with the device's own backend
    _program(device_type, root, *overrides)
    os._exit(0)  # torch with gloo now and then aborts while Python shuts down, all work done


def _in_processes(
    work: Callable[..., None], arguments: Sequence[tuple[Any, ...]], environments: Sequence[Mapping[str, str]] = ()
) -> list[int | None]:
    """Does `work` in new processes at once, with more in their environment; returns their exit codes."""
    started = []
    for given, more in zip(arguments, environments or [{}] * len(arguments), strict=True):
        process = multiprocessing.get_context("spawn").Process(target=work, args=given)
        with _environment(more):
            process.start()
        started.append(process)
    for process in started:
        process.join(300)
        process.kill()  # does nothing where it has ended
        process.join()
    return [process.exitcode for process in started]


@contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _own_compiler_cache() -> Iterator[None]:
    """What is compiled inside is compiled here and now, and not found half-written by another process."""
    with tempfile.TemporaryDirectory() as folder, _environment({"TORCHINDUCTOR_CACHE_DIR": folder}):
        yield


# Time and memory


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
        (code,) = _in_processes(_note_peak, [(file, [*overrides, "trainer.device=cpu"])], [quick])
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
        with _own_compiler_cache():
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

CHECKS: Mapping[str, Check] = {
    "layers in float32": in_float32,
    "layers in tf32": in_tf32,
    "layers in bfloat16": in_bfloat16,
    "one output in every form": one_output,
    "cached and checkpointed": kept_or_computed_again,
    "beside PEFT": beside_peft,
    "int8 base": on_quantised("int8", torch.float32, 1e-4),
    "int4 base": on_quantised("int4", torch.bfloat16, 5e-2),
    "NF4 base": on_quantised("nf4", torch.float32, 1e-4),
    "paused and gone on": gone_on,
    "killed and gone on": killed,
    "two processes by gloo": two_processes("gloo"),
    "two processes by NCCL": two_processes("nccl"),
    "no wait in a step": without_waiting,
    "memory and its plan": plans_memory(RUNS),
    "planner's constants": constants,
    "planner's choice": chosen_plans,
    "memory and its plan at real sizes": plans_memory(LARGE, large=True),
    **{f"step of {name}": step_times(workload) for name, workload in SIZES.items()},
    "compiled steps": compiled,  # last, since it takes longest
}
