"""From a command line to settings, and from settings to the objects they name."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import DocInfo, Len

from randlora.bounds import Bounded, Count, Folder, Fraction, Seed, declared
from randlora.errors import SettingsError, check_choice
from randlora.overrides import explained

if TYPE_CHECKING:
    from omegaconf import DictConfig

_PACKAGE = Path(__file__).resolve().parent
# Beside the package in a clone, inside it where a wheel is installed.
CONFIGS = next(path for path in (_PACKAGE.parent / "configs", _PACKAGE / "configs") if (path / "train.yaml").is_file())
ALLOW = "RANDLORA_ALLOW"  # environment: further package prefixes, comma-separated, such as "my_methods."

LAUNCHERS = {  # what Hydra calls the classes of randlora.sweeps.launcher
    "local": "hydra_plugins.randlora.Local",
    "slurm": "hydra_plugins.randlora.Slurm",
}
SEARCHER = "hydra_plugins.randlora.Searcher"

FOLDERS = ("run_root", "data_root", "model.weights", "model.search")  # which may be read from the environment
PARTS = ("method", "model", "task", "trainer", "optimizer", "logger")


@dataclass(frozen=True)
class General(Bounded):
    """The settings of any run beside its parts; YAML gives their defaults and says what they are."""

    section: ClassVar[str] = ""

    seed: Seed
    targets: (
        Annotated[str, DocInfo("one of the model's sets, or all-linear")]
        | Annotated[Sequence[str], Len(1), DocInfo("a list of patterns or names")]
    )
    shots: Count | None
    fraction: Fraction | None
    run_root: Folder
    data_root: Folder | None
    dry_run: bool | Literal["json"]
    predictions: bool
    resume: bool | Literal["strict"]
    retry: bool
    tags: Annotated[Sequence[str], DocInfo("a list such as [first,second]")]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> General:
        """Those of a run's settings; SettingsError for a wrong one, one that is missing, and one that nothing reads."""
        names = declared(cls)
        if "search" in config:
            raise SettingsError(
                "search: a search makes many runs; give it with -m and without hydra/sweeper, or leave it out"
            )
        for name in config:
            check_choice("setting", name, (*PARTS, *names))  # a key that nothing reads would be ignored
        for name in (*PARTS, *names):
            if name not in config:
                raise SettingsError(f"{name} must be given: add {name}=VALUE")
        return cls(**{name: config[name] for name in names})


def version_base() -> dict[str, str]:
    """What Hydra 1.3 has to be told to behave as it does, an argument of which 1.4 warns."""
    import hydra

    return {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}


def register_resolvers() -> None:
    """What the YAML files refer to: ``${epochs:FEW,ALL}`` is FEW where `shots` are given and ALL otherwise.

    And the options of ``hydra/launcher=local`` and ``slurm``, and of ``hydra/sweeper=search``; see randlora/sweeps.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    if OmegaConf.has_resolver("epochs"):
        return

    def epochs(few: Any, all_: Any, *, _root_: Any) -> Any:
        return all_ if _root_.get("shots") is None else few

    # OmegaConf 2.4 has given it the name that in 2.3 still belongs to one which knows no _root_.
    register = OmegaConf.register_new_resolver if version_base() else OmegaConf.register_resolver
    register("epochs", epochs)
    options: dict[str, dict[str, Any]] = {
        "local": {"workers": 1},
        "slurm": {
            "workers": 100,
            "cluster": "slurm",
            "minutes": 240,
            "nodes": 1,
            "gpus": 1,
            "partition": None,
        },
    }
    for name, target in LAUNCHERS.items():
        config = {"_target_": target} | options[name]
        ConfigStore.instance().store(name, config, group="hydra/launcher", provider="randlora")
    search = {"_target_": SEARCHER, "params": None}
    ConfigStore.instance().store("search", search, group="hydra/sweeper", provider="randlora")


def settings(*overrides: str) -> dict[str, Any]:
    """The settings of ``randlora OVERRIDES`` as plain data.

    Config folders of one's own are found with the override ``hydra.searchpath=[FOLDER]``. Raises SettingsError
    where the overrides do not compose.
    """
    return plain(composed(*overrides))


def composed(*overrides: str) -> DictConfig:
    """The settings of ``randlora OVERRIDES`` as Hydra composes them: values may be missing, or refer to others."""
    from hydra import compose, initialize_config_dir

    register_resolvers()
    with explained(), initialize_config_dir(str(CONFIGS), **version_base()):
        return compose("train", overrides=list(overrides))


def plain(config: DictConfig) -> dict[str, Any]:
    """A composed config as dicts, lists and scalars, interpolations resolved.

    Raises SettingsError where an interpolation cannot be resolved, where it reads the environment for anything but one
    of the FOLDERS, since a record and its mirrors hold what it gives, and where a value is missing.
    """
    from omegaconf import OmegaConf

    for key, value in _texts(OmegaConf.to_container(config)):
        if re.search(r"\$\{.*\benv\b", value, re.DOTALL) and not key.startswith(FOLDERS):
            raise SettingsError(
                f"{key}={value}: would put a variable of the environment into the record; only "
                f"{', '.join(FOLDERS)} may read one, so write the value itself"
            )
    with explained():
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def _texts(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """The texts among the keys and values of plain data, each with the dotted key where it stands."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str):
                yield path, key
            yield from _texts(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, path)
    elif isinstance(value, str):
        yield path, value


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """What nested mappings hold, by dotted key."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


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
    cls = named_class(config["_target_"])
    if dataclasses.is_dataclass(cls):
        fields = [field.name for field in dataclasses.fields(cls) if field.init]
        for key in arguments:
            if key not in fields:
                raise SettingsError(f"{cls.__name__} has no setting {key!r}; it has {', '.join(fields)}")
    try:
        return cls(**arguments)
    except TypeError as error:
        raise SettingsError(f"{config['_target_']}: {error}") from error


def named_class(target: object) -> type:
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
