"""Which runs are the same run: a hash of the settings that change the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Where data and records lie, who watches, and how often it is logged and saved do not change a result.
EXCLUDED_FROM_HASH = {
    "run_root", "data_root", "dry_run", "resume", "retry", "tags", "logger", "trainer.stop_at", "trainer.keep_adapters",
    "trainer.device", "trainer.workers", "trainer.log_every", "trainer.evaluation_batch_size", "trainer.save_every",
    "trainer.save_minutes", "trainer.keep_last", "trainer.peer_timeout", "trainer.auto_batch",
    "predictions",
}  # fmt: skip
# Settings that came later, with the value that means what was done before: then they are left out of the hash.
CAME_LATER = {
    "trainer.select": "last", "trainer.sampling": "permutation", "trainer.compile": False, "model.image_size": None,
}  # fmt: skip


def signature(config: Mapping[str, Any], task_version: int = 1) -> str:
    """Twelve hexadecimal digits; equal for configs that differ in settings EXCLUDED_FROM_HASH alone.

    A task whose scores have stopped being comparable has a higher version, and so another signature. AdamW with `betas`
    alone is hashed as it stood before there was a choice, `trainer.betas` and no `optimizer`, and settings that
    CAME_LATER are hashed where they change something: old runs are recognised.
    """
    settings = _without(_first_form(config), "") | ({"task_version": task_version} if task_version > 1 else {})
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _first_form(config: Mapping[str, Any]) -> Mapping[str, Any]:
    optimizer = config.get("optimizer", {})
    if optimizer.get("algorithm") != "AdamW" or set(optimizer) != {"_target_", "algorithm", "betas"}:
        return config
    rest = {key: value for key, value in config.items() if key != "optimizer"}
    return rest | {"trainer": {**config["trainer"], "betas": optimizer["betas"]}}


def modern(config: Mapping[str, Any]) -> dict[str, Any]:
    """A record's settings as today's: `trainer.betas` become the optimiser's, later ones are there, no logger is.

    Nor are `trainer.stop_at` and `keep_adapters`, which say where a run paused and what it left, and not what it is.
    """
    beside = ("stop_at", "keep_adapters")
    trainer = {key: value for key, value in config.get("trainer", {}).items() if key not in beside}
    adamw = {"_target_": "randlora.training.Optimizer", "algorithm": "AdamW", "betas": trainer.pop("betas", None)}
    later = {key.partition(".")[2]: value for key, value in CAME_LATER.items() if key.startswith("trainer.")}
    return {"optimizer": adamw, "predictions": True, "retry": False, **config, "trainer": later | trainer, "logger": {}}


_ABSENT = object()


def _without(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        return {
            key: _without(item, f"{path}.{key}".lstrip("."))
            for key, item in value.items()
            # A source's root is the data root again, wherever a task holds it.
            if f"{path}.{key}".lstrip(".") not in EXCLUDED_FROM_HASH
            and CAME_LATER.get(f"{path}.{key}", _ABSENT) != item
            and not (key == "root" and path.startswith("task."))
        }
    if isinstance(value, list | tuple):
        return [_without(item, path) for item in value]
    return value
