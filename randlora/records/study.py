"""results.jsonl: the results of a study, one a line, without what they share.

The first line is ``{"common": {"all": …, "task": {name: …}, "model": {name: …}, "method": {name: …}}}``: the settings
and versions that all runs share, and beyond these what all runs of a task, of a model or of a method share. Each other
line is a result with its `collection` and what is its own of `config` and `versions`; merged over the common ones it
is the result.json of the run, key by key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from randlora.errors import SettingsError
from randlora.integrity import write
from randlora.records.result import Result

_SHARED = ("config", "versions")
_GROUPS = ("task", "model", "method")


def expand(file: Path) -> list[Result]:
    """The results in a study's results.jsonl, in its order; SettingsError names the line that cannot be read."""
    results = []
    common: Mapping[str, Any] = {}
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} is no results.jsonl of a study ({error}); give its folder") from error
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            if number == 1:
                common = content["common"]
                continue
            blocks = [common["all"], *(common[group].get(content[group], {}) for group in _GROUPS)]
            collection = content.pop("collection")
            results.append(Result.from_json(reduce(_merged, [*blocks, content]), file, collection))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error if isinstance(error, SettingsError) else f"{type(error).__name__} {error}"
            raise SettingsError(f"{file}, line {number}: {reason}; collect the runs again") from error
    return results


def compress(results: Sequence[Result], file: Path) -> None:
    """Writes a study's results.jsonl, such that `expand` gives the results back."""
    contents = [result.to_json() for result in results]
    # Sorted, so that the file does not depend on the order of the settings.
    shared = [json.loads(json.dumps({key: content[key] for key in _SHARED}, sort_keys=True)) for content in contents]
    common: dict[str, Any] = {"all": reduce(_intersection, shared)}
    shared = [_difference(content, common["all"]) for content in shared]
    for group in _GROUPS:
        members: dict[str, list[dict[str, Any]]] = {}
        for content, own in zip(contents, shared, strict=True):
            members.setdefault(content[group], []).append(own)
        common[group] = {name: reduce(_intersection, members[name]) for name in sorted(members)}
    lines: list[dict[str, Any]] = [{"common": common}]
    for result, content, own in zip(results, contents, shared, strict=True):
        own = _difference(own, reduce(_merged, [common[group][content[group]] for group in _GROUPS]))
        rest = {key: value for key, value in content.items() if key not in _SHARED}
        lines.append({"collection": result.collection, **rest, **own})
    write(file, "".join(json.dumps(line) + "\n" for line in lines))


def _intersection(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The keys and values of both, in nested mappings too."""
    shared = {}
    for key in first:
        if key in second:
            if isinstance(first[key], Mapping) and isinstance(second[key], Mapping):
                shared[key] = _intersection(first[key], second[key])
            elif _same(first[key], second[key]):
                shared[key] = first[key]
    return shared


def _difference(whole: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """What `whole` has beyond `shared`, which is an `_intersection` of it."""
    own = {}
    for key, value in whole.items():
        if key not in shared:
            own[key] = value
        elif isinstance(value, Mapping) and (part := _difference(value, shared[key])):
            own[key] = part
    return own


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both, in nested mappings too; the second's value where both have one."""
    return {**first} | {
        key: _merged(first[key], value) if isinstance(value, Mapping) and isinstance(first.get(key), Mapping) else value
        for key, value in second.items()
    }


def _same(first: object, second: object) -> bool:
    """Equal in JSON, where 1, 1.0 and true differ."""
    return json.dumps(first) == json.dumps(second)
