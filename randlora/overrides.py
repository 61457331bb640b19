"""What is wrong with a command line, in one sentence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from randlora.errors import SettingsError


@contextmanager
def explained() -> Iterator[None]:
    """Raises SettingsError, in one sentence, for what Hydra and OmegaConf refuse inside."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingsError(explain(error)) from error
    except ValueError as error:
        if "Config group override must be" not in str(error):
            raise
        raise SettingsError("a group such as task takes the name of an option: task=digits; see --help") from error


def explain(error: BaseException) -> str:
    """Hydra's and OmegaConf's errors, which run over several lines, as one sentence with the remedy."""
    cause = error.__cause__ or error
    text = str(error)
    option = re.search(r"Could not (?:find|load) '(\w+)/([^']+)'", text)
    if option:
        names = options(option[1], map(Path, re.findall(r"path=file://(.+)", text)))
        if names:
            return f"{option[1]}={option[2]}: choose one of {_near(option[2], names)}{_did_you_mean(option[2], names)}"
    key = re.search(r"Key '(\w+)' is not in struct", f"{text}\n{cause}")
    if key:
        parent = getattr(cause, "parent_node", None)
        full_key = str(getattr(cause, "full_key", None) or key[1])
        names = [str(name) for name in parent or () if name not in ("_target_", "hydra")]
        where = full_key.rpartition(".")[0] or "the command line"
        if not names:
            return f"{full_key}: no such setting; choose an option of the group, {where}=NAME; see --help"
        return f"{full_key}: no such setting; {where} has {', '.join(names)}{_did_you_mean(key[1], names)}"
    unresolved = re.search(r"Error resolving interpolation .*, possible interpolation keys: (.*)", text)
    if unresolved:  # the options of model and method together name a file of rates
        lacking = [group for group in ("model", "method") if group not in unresolved[1].split(", ")]
        if lacking:
            return f"{lacking[0]}: every run has one; give {lacking[0]}=NAME; see --help"
    if "Missing mandatory value" in f"{text}\n{cause}":
        missing = getattr(cause, "full_key", "a setting")
        return f"{missing} must be given: add {missing}=VALUE"
    return " ".join(line.strip() for line in text.splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line)


def options(group: str, folders: Iterable[Path]) -> list[str]:
    """The options of a group in config folders, those in its own folders too: `clip_b32/lora`.

    Files whose name begins with an underscore are parts of others, and no options.
    """
    paths = {path.relative_to(folder / group) for folder in folders for path in (folder / group).rglob("[!_]*.yaml")}
    return sorted(path.with_suffix("").as_posix() for path in paths)


def _near(option: str, names: list[str]) -> str:
    """The names in the folder of `option`, or else all; those of a deeper folder as `folder/…`."""
    folder = option[: option.rfind("/") + 1]
    inside = [name for name in names if name.startswith(folder)]
    if not inside:
        folder, inside = "", names
    return ", ".join(dict.fromkeys(folder + re.sub("/.*", "/…", name[len(folder) :]) for name in inside))


def _did_you_mean(word: str, names: list[str]) -> str:
    close = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""
