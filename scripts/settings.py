"""python scripts/settings.py > docs/settings.md: every setting, its default and what it may be, as declared."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

from omegaconf import OmegaConf

import randlora.data.glyphs
import randlora.experiment
import randlora.records.tensorboard
import randlora.records.wandb
import randlora.sweeps.strategies  # noqa: F401 -- so that their classes are known
from randlora.bounds import Bounded, allowed, declared
from randlora.config import CONFIGS, General
from randlora.tasks.base import Budget

HEAD = """\
# All settings

What each setting may be, and the default of its class; the YAML of an option may set another. A value of another type
or out of its range is refused before anything is loaded, in one sentence and with exit code 2. Nothing is converted: a
text is no number, and neither is true. Numbers are finite. What the settings mean is said in the
[API reference](api.md).

`run_root`, `data_root`, `model.weights` and `model.search` may read the environment, as in
`data_root=${oc.env:DATA}`: what they give is a folder, and is recorded. Elsewhere this is refused, since a record and
its dashboards would keep what the variable holds.

This page is made by `python scripts/settings.py > docs/settings.md`."""


def page() -> str:
    """docs/settings.md."""
    general = OmegaConf.to_container(OmegaConf.load(CONFIGS / "train.yaml"))
    parts = [HEAD, "## Of any run", _table(General, dict(general))]  # type: ignore[arg-type]
    classes = [cls for cls in _subclasses(Bounded) if cls not in (General, Budget) and not inspect.isabstract(cls)]
    for cls in sorted(classes, key=lambda cls: (cls.__module__, cls.__name__)):
        if dataclasses.is_dataclass(cls) and _is_of_runs(cls) and not _is_base(cls):
            where = "method" if cls.__module__.startswith("randlora.methods") else cls.section
            parts += [f"## {cls.__name__} (`{where}`)", _table(cls, {}) if declared(cls) else "No settings."]
    return "\n\n".join(parts) + "\n"


def _table(cls: type[Bounded], given: dict[str, Any]) -> str:
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    rows = ["| setting | default | allowed |", "|---|---|---|"]
    for name, annotation in declared(cls).items():
        words = allowed(annotation).replace("{}", "`{}`")
        rows.append(f"| `{name}` | {_default(fields[name], given)} | {words} |")
    return "\n".join(rows)


def _default(field: dataclasses.Field[Any], given: dict[str, Any]) -> str:
    """As it is written in YAML; a dash where there is none."""
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    value = given.get(field.name, default)
    return "–" if value is dataclasses.MISSING else f"`{json.dumps(value)}`"


def _is_of_runs(cls: type) -> bool:
    """Whether a run has such settings; commands on finished runs have their own help."""
    return cls.__module__.startswith("randlora.") and not cls.__module__.startswith("randlora.use.")


def _is_base(cls: type) -> bool:
    """Whether others are made of it and YAML does not name it."""
    return cls.__name__ in ("Model", "Pretrained", "Settings", "LanguageModelTask")


def _subclasses(cls: type[Bounded]) -> list[type[Bounded]]:
    return list(dict.fromkeys(each for direct in cls.__subclasses__() for each in (direct, *_subclasses(direct))))


if __name__ == "__main__":
    print(page(), end="")
