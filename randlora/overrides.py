"""What is wrong with a command line, in one sentence."""

from __future__ import annotations

import difflib
import re


def explain(error: BaseException) -> str:
    """Hydra's and OmegaConf's errors, which run over several lines, as one sentence with the remedy."""
    cause = error.__cause__ or error
    text = str(error)
    group = re.search(r"Could not find '([\w/]+?)/([\w.-]+)'\n\nAvailable options in '[\w/]+':\n((?:\t\S+\n?)+)", text)
    if group:
        options = [option for option in group[3].split() if not option.startswith("_")]
        return f"{group[1]}={group[2]}: choose one of {', '.join(options)}{_did_you_mean(group[2], options)}"
    key = re.search(r"Key '(\w+)' is not in struct", f"{text}\n{cause}")
    if key:
        parent = getattr(cause, "parent_node", None)
        full_key = str(getattr(cause, "full_key", None) or key[1])
        known = [str(name) for name in parent if name != "_target_"] if parent is not None else []
        where = full_key.rpartition(".")[0] or "the command line"
        return f"{full_key}: no such setting; {where} has {', '.join(known)}{_did_you_mean(key[1], known)}"
    missing = re.search(r"Missing mandatory value: ([\w.]+)", f"{text}\n{cause}")
    if missing:
        return f"{missing[1]} must be given: add {missing[1]}=VALUE"
    return " ".join(line.strip() for line in text.splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line)


def _did_you_mean(word: str, options: list[str]) -> str:
    close = difflib.get_close_matches(word, options, n=1)
    return f"; did you mean {close[0]}?" if close else ""
