"""Whether whole runs are exact on a device: paused, killed, shared by processes. Model and data are embedded."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import signal
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from randlora.adapters.interface import Step
from randlora.analysis.device.place import Check, Place, error, in_processes, largest
from randlora.analysis.device.report import Figures, NotHere, Wrong, within
from randlora.config import CONFIGS, settings
from randlora.errors import FINISHED
from randlora.experiment import Experiment
from randlora.run import run
from randlora.training.loop import Loop

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
            (code,) = in_processes(_until_killed, [(place.device.type, at / "killed", method)])
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
                codes = in_processes(_as_one_of_two, [arguments] * 2, ranks)
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
