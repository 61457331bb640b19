"""How a run that does not finish ends: what its result says, and what the same command will do."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from randlora.data.loader import Unreadable
from randlora.integrity import disk_fault
from randlora.records.record import Record
from randlora.signals import Interrupted
from randlora.training import Diverged, Trainer, checkpoint
from randlora.training.out_of_memory import out_of_memory
from randlora.training.processes import lost

if TYPE_CHECKING:
    from accelerate import Accelerator

NOTHING = "nothing was begun: the same command begins"  # of an interrupted run without a checkpoint
LOST = "there was no checkpoint yet: the same command begins again"


def ending(error: BaseException, record: Record, accelerator: Accelerator, trainer: Trainer) -> dict[str, Any]:
    """The fields of the result of a run that this error ended; none where it is a fault of the code."""
    text, first = str(error), str(error).partition("\n")[0]
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return interrupted(record, text.partition(" at ")[0] or "stopped by SIGINT", NOTHING)
    if isinstance(error, Diverged):
        return {"status": "diverged", "error": text}
    if isinstance(error, Unreadable):
        return {"error": text}
    if out_of_memory(error):
        remedy = "lower trainer.micro_batch_size, set trainer.auto_batch=true or trainer.precision=bf16"
        return {"status": "out_of_memory", "error": f"{first or 'out of memory'} ({remedy})"}
    # What it was sending may be missed before its death is noticed.
    dead = trainer.workers > 0 and isinstance(error, ConnectionError | EOFError)
    if dead:
        with suppress(RuntimeError):
            time.sleep(1)  # torch's own notice of the death is raised wherever the program is: here, not in the record
    if dead or (isinstance(error, RuntimeError) and "DataLoader worker (pid" in text):
        return {
            "error": f"a process that reads data has died ({first}); is there memory for trainer.workers="
            f"{trainer.workers}? {_kept(record) or LOST}"
        }
    if disk_fault(error) or (accelerator.is_main_process and not record.folder.is_dir()):
        return {"error": unwritable(error, record)}
    sentence = lost(error, accelerator, trainer.peer_timeout)
    return {"error": sentence} if sentence else {}


def unwritable(error: BaseException, record: Record) -> str:
    """A sentence for a file that cannot be written."""
    if not record.folder.is_dir():
        return f"the run folder {record.folder} is gone ({error})"
    return f"{disk_fault(error) or error} in {record.folder}, make room; {_kept(record) or LOST}"


def interrupted(record: Record, why: str, without_checkpoint: str) -> dict[str, Any]:
    """The fields of the result of an interrupted run, with what the next attempt goes on from."""
    return {"status": "interrupted", "error": f"{why}; {_kept(record) or without_checkpoint}"}


def _kept(record: Record) -> str | None:
    """What the next attempt goes on from, if there is a checkpoint."""
    latest = checkpoint.latest(record.checkpoints)
    return f"checkpoint at step {int(latest.name.rpartition('_')[2])}: the same command goes on" if latest else None
