"""The command line that repeats a run, from the settings in its record."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from randlora.config import leaves
from randlora.errors import SettingsError
from randlora.records import Result
from randlora.records.signature import CAME_LATER, EXCLUDED_FROM_HASH
from randlora.studies.arms import flat_settings

Names = tuple[str, str, str]  # of method, model and task


class Command(NamedTuple):
    """What to type, and the settings that came later than the record, which take today's defaults; "" where unknown."""

    line: str
    later: Sequence[str]


class Commands:
    """Commands of runs, by comparison with the settings that this version composes for method, model and task.

    Args:
        results: Of all runs that are asked for, so that everything is composed once.
    """

    def __init__(self, results: Iterable[Result]):
        names = dict.fromkeys((result.method, result.model, result.task) for result in results)
        self._defaults = _compose(list(names))

    def of(self, result: Result) -> Command:
        """The command of one run; an empty line where this version has no such method, model or task."""
        names = result.method, result.model, result.task
        if names not in self._defaults:
            return Command("", ())
        defaults, settings = self._defaults[names], flat_settings(result)
        place = settings.get("data_root")
        overrides = [f"{group}={name}" for group, name in zip(("method", "model", "task"), names, strict=True)]
        for key, value in settings.items():
            own = key == "data_root" or (key not in EXCLUDED_FROM_HASH and (place is None or value != place))
            if own and not key.startswith("logger") and (key not in defaults or defaults[key] != value):
                overrides.append(f"{'' if key in defaults else '+'}{key}={hydra_value(value)}")
        later = [key for key in defaults if key not in settings and key not in EXCLUDED_FROM_HASH]
        line = shlex.join(["python", "train.py", *overrides])
        return Command(line, [key for key in later if key not in CAME_LATER and not key.startswith("logger")])


def _compose(names: Sequence[Names]) -> dict[Names, dict[str, object]]:
    """The settings of the bare command of each, by dotted key; those that do not compose are left out."""
    from hydra import compose, initialize_config_dir

    from randlora.config import CONFIGS, plain, register_resolvers, version_base
    from randlora.overrides import explained

    register_resolvers()
    settings = {}
    with initialize_config_dir(str(CONFIGS), **version_base()):
        for method, model, task in names:
            try:
                with explained():
                    config = compose("train", overrides=[f"method={method}", f"model={model}", f"task={task}"])
                settings[method, model, task] = dict(leaves(plain(config)))
            except SettingsError:  # of one's own config folders, or of an older version
                continue
    return settings


def hydra_value(value: object) -> str:
    """A setting as Hydra's grammar of overrides has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{hydra_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(hydra_value, value)) + "]"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_][\w.*/-]*", value):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)
