"""What came out of one run: the typed content of result.json, the only place that spells it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from randlora.errors import SettingsError
from randlora.integrity import Damaged, digest, sha256, sync, write_json

SCHEMA = 2  # 1: records before November 2026, without names and budget at the top level
STATUSES = ("finished", "failed", "diverged", "out_of_memory", "interrupted", "paused")
NO_MODEL = "none"  # what records call the model of a score that needs no pretrained one
# What records call the methods whose class is named otherwise; all others are their class in lower case.
METHOD_NAMES = {"FullFineTuning": "full", "RandLoRAa": "randlora_a"}


class Headline(NamedTuple):
    """The score that a task is reported by: its name, ``test/…``, and its value; None of a run that did not finish."""

    name: str
    value: float | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run. What a run that ended early does not know is None.

    Args:
        task, model, method: The names of what was combined.
        shots, fraction: The budget: images per class, or a part of the training set; both None for all of it.
        seed: Of the subsample, the order of the data, the bases and the weights that start random.
        signature: Twelve hexadecimal digits, equal for runs whose settings are the same.
        headline: The score that the task is reported by.
        config: All settings.
        task_version: Scores of two versions of a task are not comparable.
        status: One of STATUSES.
        metrics: ``zero_shot/…`` (before training, where there is such a score), ``validation/…`` and ``test/…``.
        calibrated: Settings of the method that it chose from training data, such as ranks.
        trainable_parameters: Of the method; the head's are in `head_parameters`, and both in `total_parameters`.
        adapter_bytes: Size of the saved adapter.
        train_seconds: Of the optimisation alone, without evaluation.
        peak_memory_bytes: Of the device, or of the process where there is no accelerator.
        steps: Of the optimiser; of a paused run those that it has done.
        selected_step: The step whose parameters are scored and saved, where the best on validation was selected.
        micro_batch_size: What it was in the end, where `trainer.auto_batch` was allowed to lower it.
        examples: Sizes of the splits, by name.
        versions: Of Python and of the packages that a result depends on.
        commit: Of this code, with ``+`` when the work tree had changes.
        device: Its name.
        error: One sentence about a run that did not finish.
        schema: Version of this list.
        path: The file that the result was read from; not written.
        collection: The part of a study that the run belongs to; not written.
        files: The SHA-256 of the files that a finished run left beside its result.json, by name; in that file alone.
    """

    task: str
    model: str
    method: str
    shots: int | None
    fraction: float | None
    seed: int
    signature: str
    headline: Headline
    config: Mapping[str, Any]
    task_version: int = 1
    status: str = "failed"
    metrics: Mapping[str, float] = field(default_factory=dict)
    calibrated: Mapping[str, Any] | None = None
    trainable_parameters: int | None = None
    head_parameters: int | None = None
    total_parameters: int | None = None
    adapter_bytes: int | None = None
    train_seconds: float | None = None
    seconds_per_step: float | None = None
    peak_memory_bytes: int | None = None
    steps: int | None = None
    selected_step: int | None = None
    micro_batch_size: int | None = None
    examples: Mapping[str, int] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    device: str | None = None
    error: str | None = None
    schema: int = SCHEMA
    path: Path | None = field(default=None, compare=False)
    collection: str = field(default="", compare=False)
    files: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def metric(self) -> str:
        """The headline's name without its split."""
        return self.headline.name.removeprefix("test/")

    @property
    def before(self) -> float | None:
        """The headline's score before training, where the task has one."""
        return self.metrics.get(f"zero_shot/{self.metric}")

    @property
    def validation(self) -> float | None:
        """The headline's score on the validation split, the only one that may choose a setting."""
        return self.metrics.get(f"validation/{self.metric}")

    def to_json(self) -> dict[str, Any]:
        """The content of result.json as plain data; NaN and infinity are text, which JSON lacks."""
        content = {key: getattr(self, key) for key in _HINTS}
        return finite(content | {"headline": self.headline._asdict()})

    @classmethod
    def from_json(cls, content: object, path: Path, collection: str = "") -> Result:
        """The result that `to_json` gave, or that of a record of schema 1; SettingsError names `path` and the key."""
        if not isinstance(content, Mapping):
            raise SettingsError(f"{path}: a result is a mapping, and this is {content!r:.60}; {_REMEDY}")
        content = dict(content) if "schema" in content else _of_schema_1(content)
        if content.pop("sha256", None) not in (None, digest(content)):  # results of before had none
            raise Damaged(f"{path} is damaged: its SHA-256 is not that of its content; {_REMEDY}")
        files = content.pop("files", {})
        if content["schema"] != SCHEMA:
            raise SettingsError(f"{path}: 'schema' is {content['schema']!r}; this version reads 1 and {SCHEMA}")
        for key in content:
            if key not in _HINTS:
                raise SettingsError(f"{path}: {key!r} is no key of a result; {_REMEDY}")
        for key, hint in _HINTS.items():
            if key not in content and key not in _REQUIRED:
                continue
            value = _floats(content.get(key)) if key in _MEASURED else content.get(key)
            if not _fits(value, hint):
                raise SettingsError(f"{path}: {key!r} is {content.get(key, 'missing')!r:.60}; {_REMEDY}")
            content = {**content, key: value}
        if content["status"] not in STATUSES:
            raise SettingsError(f"{path}: 'status' is {content['status']!r}, not one of {', '.join(STATUSES)}")
        headline = Headline(**content["headline"])
        return cls(**{**content, "headline": headline}, path=path, collection=collection, files=files)

    def write(self, path: Path, files: Iterable[str] = ()) -> None:
        """Writes result.json, whole or not at all, with the SHA-256 of these files beside it and of its own content."""
        for name in files:
            sync(path.parent / name)
        content = self.to_json() | {"files": {name: sha256(path.parent / name) for name in files}}
        write_json(path, content)

    @classmethod
    def read(cls, path: Path) -> Result:
        """The result in the file `path`; SettingsError where it is missing, damaged or of something else."""
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise SettingsError(f"{path} cannot be read as a result ({error}); {_REMEDY}") from error
        return cls.from_json(content, path)


_REMEDY = "remove the file, or make it again by the run's command"
_HINTS = {key: hint for key, hint in get_type_hints(Result).items() if key not in ("path", "collection", "files")}
_MEASURED = ("headline", "metrics", "train_seconds", "seconds_per_step")  # what may be NaN or infinite
_REQUIRED = {f.name for f in fields(Result) if f.default is MISSING and f.default_factory is MISSING} | {"status"}


def _of_schema_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """Names and budget of an old record, which only its settings say."""

    def setting(*keys: str) -> Any:
        value: Any = content.get("config")
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    target = str(setting("method", "_target_") or "").rpartition(".")[2]
    names = {
        "task": setting("task", "name"),
        "model": setting("model", "name"),
        "method": METHOD_NAMES.get(target, target.lower()) or None,
        "shots": setting("shots"),
        "fraction": setting("fraction"),
        "schema": SCHEMA,
    }
    return {**content, **names}


def _fits(value: object, hint: Any) -> bool:
    """Whether JSON's `value` is of the type `hint`; a whole number does for a float."""
    if hint is Headline:
        return isinstance(value, Mapping) and set(value) == {"name", "value"} and _fits(value["value"], float | None)
    if get_origin(hint) is Mapping:
        parts = get_args(hint)[1]
        return isinstance(value, Mapping) and all(parts is Any or _fits(part, parts) for part in value.values())
    if get_args(hint):
        return any(_fits(value, choice) for choice in get_args(hint))
    return isinstance(value, int | float if hint is float else hint) and not isinstance(value, bool)


def _floats(value: Any) -> Any:
    """The value with NaN and infinity for the texts that `finite` made of them."""
    if isinstance(value, Mapping):
        return {key: _floats(item) for key, item in value.items()}
    return float(value) if value in ("nan", "inf", "-inf") else value


def finite(value: Any) -> Any:
    """The value with every NaN and infinity as text: JSON has none."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
