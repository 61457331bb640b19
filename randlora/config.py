"""From a command line to settings, and from settings to the objects they name."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from randlora.errors import SettingsError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ALLOW = "RANDLORA_ALLOW"  # environment: further package prefixes, comma-separated, such as "my_methods."


def register_resolvers() -> None:
    """What the YAML files compute: ``${epochs:FEW,ALL}`` is FEW where `shots` are given and ALL otherwise."""
    from omegaconf import DictConfig, OmegaConf

    def epochs(few: float, all_: float, *, _root_: DictConfig) -> float:
        return all_ if _root_.get("shots") is None else few

    OmegaConf.register_new_resolver("epochs", epochs, replace=True)


def settings(*overrides: str) -> dict[str, Any]:
    """The settings of ``python train.py OVERRIDES`` as plain data; SettingsError where they do not compose."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from randlora.overrides import explain

    register_resolvers()
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose("train", overrides=list(overrides))
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingsError(explain(error)) from error


def build(config: Any) -> Any:
    """The object of a plain config: mappings with a `_target_` are called with their other keys, innermost first.

    Only targets under randlora (and the prefixes in $RANDLORA_ALLOW) are called: a config is data, and must not be
    able to run just anything. Raises SettingsError for other targets, unknown keys and missing ones.
    """
    if isinstance(config, list):
        return [build(item) for item in config]
    if not isinstance(config, Mapping):
        return config
    settings = {key: build(value) for key, value in config.items() if key != "_target_"}
    if "_target_" not in config:
        return settings
    made = _find(config["_target_"])
    if dataclasses.is_dataclass(made):
        known = [f.name for f in dataclasses.fields(made) if f.init]
        for key in settings:
            if key not in known:
                raise SettingsError(f"{made.__name__} has no setting {key!r}; it has {', '.join(known)}")
    try:
        return made(**settings)
    except TypeError as error:
        raise SettingsError(f"{config['_target_']}: {error}") from error


def _find(target: str) -> Any:
    allowed = ("randlora.", *(prefix for prefix in os.environ.get(ALLOW, "").split(",") if prefix))
    if not isinstance(target, str) or not target.startswith(allowed):
        raise SettingsError(
            f"_target_={target!r}: only {', '.join(allowed)} may be named; add others to ${ALLOW}, comma-separated"
        )
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"_target_={target!r} cannot be imported: {error}") from error
    if not isinstance(found, type):
        raise SettingsError(f"_target_={target!r} is not a class")
    return found
