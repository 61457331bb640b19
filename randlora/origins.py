"""Which file or override set a setting: method, task, rates and experiment may each set `trainer.learning_rate`.

Hydra keeps no such list, so its list of files is walked a second time; Hydra has to be initialized meanwhile.
Throughout, `config` is the composed settings without their `hydra` node, and `hydra` is that node:
`HydraConfig.get()` in a run, `compose(…, return_hydra_config=True).hydra` elsewhere.
"""

from __future__ import annotations

import json
import os
from itertools import chain
from typing import NamedTuple

from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.defaults_list import DefaultsList
from hydra.conf import HydraConf
from hydra.core.default_element import GroupDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from randlora.config import leaves, plain

COMMAND_LINE = "command line"
WIDTH = 60  # characters of a value that are printed


class Writer(NamedTuple):
    """What sets a key, and the value as it is written there, interpolations as they stand.

    `source` is COMMAND_LINE or a file: under configs/, or from the current folder for a file of the user's.
    """

    source: str
    value: object


def origins(config: DictConfig, hydra: HydraConf) -> dict[str, list[Writer]]:
    """Each key's writers in the order in which Hydra merges them, by dotted key: the last one's value is the key's.

    A list in a config is one value.
    """
    composed = dict(leaves(OmegaConf.to_container(config)))
    writers: dict[str, list[Writer]] = {key: [] for key in composed}
    repository, defaults = _repository(hydra), _defaults(hydra)
    for default in defaults.defaults:
        path = str(default.config_path)
        file = repository.load_config(path)
        if file is None:  # an `optional` one
            continue
        for key, value in leaves(OmegaConf.to_container(file.config), default.package or ""):
            if key in writers:
                writers[key].append(Writer(_name(path, repository), value))
    for override in defaults.config_overrides:
        for key, value in leaves(override.value(), override.key_or_group):
            parent = key.rpartition(".")[0]
            if key in writers:
                writers[key].append(Writer(COMMAND_LINE, value))
            elif parent in writers:  # one item of a list
                writers[parent].append(Writer(COMMAND_LINE, composed[parent]))
    return writers


def choices(hydra: HydraConf) -> dict[str, list[Writer]]:
    """Each group's option in the primary config, and after it the option that was chosen instead, by group."""
    repository, overrides = _repository(hydra), _defaults(hydra).overrides
    primary = str(hydra.job.config_name)
    writers = {
        str(default.group): [Writer(_name(primary, repository), default.value)]
        for default in repository.load_config(primary).defaults_list
        if isinstance(default, GroupDefault) and not default.override
    }
    for group, option in overrides.override_choices.items():
        file = overrides.override_metadata[group].containing_config_path
        source = COMMAND_LINE if file is None else _name(file, repository)
        writers.setdefault(group, []).append(Writer(source, option))
    return {group: by for group, by in writers.items() if not group.startswith("hydra/")}


def differences(config: DictConfig, hydra: HydraConf) -> str:
    """The choices and settings that differ from the defaults, a line each: what set it, and what that overrode."""
    resolved = dict(leaves(plain(config)))
    rows = []
    for key, (*overridden, winner) in chain(choices(hydra).items(), origins(config, hydra).items()):
        if any(writer.value != winner.value for writer in overridden):
            over = ", ".join(f"{_short(writer.value)} in {writer.source}" for writer in reversed(overridden))
            rows.append((key, _short(resolved.get(key, winner.value)), f"{winner.source}, over {over}"))
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return "\n".join(
        ["settings that differ from the defaults, and what set them"]
        + [f"{key:{widths[0]}}  {value:{widths[1]}}  {source}" for key, value, source in rows]
    )


def _repository(hydra: HydraConf) -> CachingConfigRepository:
    """The config folders of a run, in the order in which Hydra searches them."""
    search_path = ConfigSearchPathImpl()
    for source in hydra.runtime.config_sources:
        search_path.append(source.provider, f"{source.schema}://{source.path}")
    return CachingConfigRepository(ConfigRepository(search_path))


def _name(config_path: str, repository: CachingConfigRepository) -> str:
    """What Writer calls a config such as `task/digits`."""
    file = repository.load_config(config_path)
    folder = "" if file.provider == "main" else os.path.relpath(file.path.removeprefix("file://"))
    return os.path.join(folder, f"{config_path}.yaml")


def _defaults(hydra: HydraConf) -> DefaultsList:
    """The files that Hydra merges for a run's overrides, in order, and the overrides of single keys."""
    loader = GlobalHydra.instance().config_loader()
    overrides = [*hydra.overrides.hydra, *hydra.overrides.task]
    return loader.compute_defaults_list(hydra.job.config_name, overrides, RunMode.RUN)


def _short(value: object) -> str:
    """A value as YAML has it, cut to WIDTH."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"
