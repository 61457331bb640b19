"""The processes of a run: which kinds of parallelism there are, and what they tell each other when one fails."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed

from randlora.errors import FAILED, SettingsError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

# What accelerate's environment can switch on, and why it is refused. Without this accelerate would do it, or a part of
# it, under a trainer that computes something else.
SHARDS = "every process must hold the whole frozen weights: updates read them, merge with them and share parameters"
ELSEWHERE = "it would act on every step beside the trainer's own settings"
REFUSED = {
    "ACCELERATE_USE_FSDP": ("fully sharded data parallelism", SHARDS),
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", SHARDS),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", SHARDS),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("tensor, context or sharded parallelism", SHARDS),
    "ACCELERATE_MIXED_PRECISION": ("accelerate's mixed precision", f"{ELSEWHERE}, which are trainer.precision"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "accelerate's gradient accumulation", f"{ELSEWHERE}, which are trainer.micro_batch_size",
    ),
    "ACCELERATE_DYNAMO_BACKEND": ("accelerate's compilation", ELSEWHERE),
}  # fmt: skip
SWITCHED_OFF, UNSET = ("", "0", "no", "false", "off", "n", "f"), ("", "no", "1")
SECONDS_BETWEEN_LOOKS, GRACE_SECONDS = 1.0, 5.0


def processes(cpu: bool, peer_timeout: float) -> Accelerator:
    """The devices and processes of this run: one, or several that are data-parallel.

    Args:
        cpu: Whether to leave accelerators of this machine alone.
        peer_timeout: Minutes that a process waits for another one before it gives up.

    Raises:
        SettingsError: Where accelerate's environment asks for any other parallelism.
    """
    for name, (what, reason) in REFUSED.items():
        value = os.environ.get(name, "")
        if value.lower() not in (SWITCHED_OFF if "_USE_" in name else UNSET):
            raise SettingsError(
                f"{name}={value}: {what} is not supported, because {reason}; unset it, or launch with torchrun, which "
                "is plain data parallelism"
            )
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    # The buffers are the fixed bases, which every process draws alike.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    group = InitProcessGroupKwargs(timeout=timedelta(minutes=peer_timeout))
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[ddp, group])
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise SettingsError(f"accelerate brings {kind}, and only plain data parallelism is supported: use torchrun")
    return accelerator


class Peers:
    """How the first failure of any process comes into the record, which only the main process writes.

    A process that fails leaves a note in the store by which all have met, before it ends and breaks the collective that
    the others wait in. Their error then says nothing, and the note does.

    Args:
        accelerator: Of this run.
        run: The run's name: a sweep has several in the same processes.
    """

    def __init__(self, accelerator: Accelerator, run: str):
        self.rank, self.world, self.key = accelerator.process_index, accelerator.num_processes, f"failure of {run}"
        self.store = distributed.distributed_c10d._get_default_store() if self.world > 1 else None

    def first(self, ended: Mapping[str, Any]) -> dict[str, Any]:
        """Of how this process ended and any failure noted by another, what came first, as a result's fields.

        A stop on request is not noted: all processes make it together, and a launcher asks for it after a failure.
        """
        if self.store is None:
            return dict(ended)
        own = json.dumps({"rank": self.rank, **ended})
        note: str | bytes = own
        try:
            if ended.get("status") != "interrupted":
                note = self.store.compare_set(self.key, "", own)
            elif self.store.check([self.key]):
                note = self.store.get(self.key)
        except RuntimeError:  # the process that kept the store is gone
            return dict(ended)
        earliest = json.loads(note)
        rank = earliest.pop("rank")
        if rank != self.rank and earliest != ended:
            earliest["error"] = f"process {rank} of {self.world}: {earliest.get('error')}"
        return earliest

    @contextmanager
    def watched(self, record: Callable[[dict[str, Any]], None]) -> Iterator[None]:
        """Inside, a failure of another process ends this one, too, after `record` of it, if no error does so by itself.

        With NCCL a collective whose peer is gone waits for its timeout; a launcher would kill this process before.
        """
        store, left = self.store, threading.Event()
        if store is None or self.rank != 0:
            yield
            return

        def watch() -> None:
            try:
                while not left.wait(SECONDS_BETWEEN_LOOKS):
                    if store.check([self.key]) and not left.wait(GRACE_SECONDS):
                        record(self.first({}))
                        os._exit(FAILED)
            except RuntimeError:
                return  # the store is gone, and with it every peer

        thread = threading.Thread(target=watch, daemon=True, name="peers")
        thread.start()
        try:
            yield
        finally:
            left.set()
            thread.join()


def lost(error: BaseException, accelerator: Accelerator, peer_timeout: float) -> str | None:
    """A sentence for an error that means that another process is gone or stuck; None for any other error."""
    text = str(error)
    if accelerator.num_processes == 1 or not (
        isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in text.lower())
    ):
        return None
    rank, world, first = accelerator.process_index, accelerator.num_processes, text.splitlines()[0]
    if "timed out" in text.lower() or "timeout" in text.lower():
        return (
            f"process {rank} of {world} waited {peer_timeout:g} minutes for another one and gave up: it is stuck, or "
            f"slower than trainer.peer_timeout allows ({first})"
        )
    return f"process {rank} of {world} lost another one, which ended without a word: was it killed? ({first})"


def summed(accelerator: Accelerator, *values: float) -> list[float]:
    """Each value summed over all processes."""
    if accelerator.num_processes == 1:
        return [*values]
    total: Any = accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device), "sum")
    return total.tolist()


def of_the_main_process(accelerator: Accelerator, value: T) -> T:
    """What the main process gives, on all."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    (shared,) = broadcast_object_list([value])
    return shared


def as_the_main_process(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """Does it on the main process; what it returns or raises there is returned or raised on all."""
    outcome: tuple[Any, Exception | None] = None, None
    if accelerator.is_main_process:
        try:
            outcome = act(), None
        except Exception as error:
            outcome = None, error
    value, failure = of_the_main_process(accelerator, outcome)
    if failure is not None:
        raise failure
    return value
