"""From a command line to settings, and from settings to the objects they name."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from randlora.errors import SettingsError
from randlora.overrides import explained

if TYPE_CHECKING:
    from omegaconf import DictConfig

_PACKAGE = Path(__file__).resolve().parent
# Beside the package in a clone, inside it where a wheel is installed.
CONFIGS = next(path for path in (_PACKAGE.parent / "configs", _PACKAGE / "configs") if (path / "train.yaml").is_file())
ALLOW = "RANDLORA_ALLOW"  # environment: further package prefixes, comma-separated, such as "my_methods."


def register_resolvers() -> None:
    """What the YAML files evaluate: ``${epochs:FEW,ALL}`` is FEW where `shots` are given and ALL otherwise."""
    from omegaconf import OmegaConf

    def epochs(few: float, all_: float, *, _root_: DictConfig) -> float:
        return all_ if _root_.get("shots") is None else few

    OmegaConf.register_new_resolver("epochs", epochs, replace=True)


def settings(*overrides: str) -> dict[str, Any]:
    """The settings of ``randlora OVERRIDES`` as plain data.

    Config folders of one's own are found with the override ``hydra.searchpath=[FOLDER]``. Raises SettingsError
    where the overrides do not compose.
    """
    from hydra import compose, initialize_config_dir

    register_resolvers()
    with explained(), initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return plain(compose("train", overrides=list(overrides)))


def plain(config: DictConfig) -> dict[str, Any]:
    """A composed config as dicts, lists and scalars, interpolations resolved.

    Raises SettingsError where an interpolation cannot be resolved or a value is missing.
    """
    from omegaconf import OmegaConf

    with explained():
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def build(config: object) -> Any:
    """The object of a plain config: mappings with a `_target_` are called with their other keys, innermost first.

    A config is data, and must not be able to run just anything: a target is a class under randlora, or under one of
    the prefixes in $RANDLORA_ALLOW.

    Args:
        config: what `settings` returns, or a part of it.

    Returns:
        An instance of the class that `_target_` names; lists and mappings without one as they are, their items built.

    Raises:
        SettingsError: for other targets, unknown keys and missing ones, and for what the class itself refuses.
    """
    if isinstance(config, list):
        return [build(item) for item in config]
    if not isinstance(config, Mapping):
        return config
    arguments = {key: build(value) for key, value in config.items() if key != "_target_"}
    if "_target_" not in config:
        return arguments
    cls = _class(config["_target_"])
    if dataclasses.is_dataclass(cls):
        fields = [field.name for field in dataclasses.fields(cls) if field.init]
        for key in arguments:
            if key not in fields:
                raise SettingsError(f"{cls.__name__} has no setting {key!r}; it has {', '.join(fields)}")
    try:
        return cls(**arguments)
    except TypeError as error:
        raise SettingsError(f"{config['_target_']}: {error}") from error


def _class(target: object) -> type:
    """The class of an allowed dotted name; SettingsError for any other."""
    allowed = ("randlora.", *(prefix for prefix in os.environ.get(ALLOW, "").split(",") if prefix))
    if not isinstance(target, str) or not target.startswith(allowed):
        raise SettingsError(
            f"_target_={target!r}: only {', '.join(allowed)} may be named; add others to ${ALLOW}, comma-separated"
        )
    module, _, name = target.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"_target_={target!r} cannot be imported: {error}") from error
    if not isinstance(cls, type):
        raise SettingsError(f"_target_={target!r} is not a class")
    return cls
