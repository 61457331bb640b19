"""What made a result: the versions of the packages, and the commit of this code."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    known = {"python": platform.python_version()}
    for name in ("randlora", "torch", "transformers", "open_clip_torch", "accelerate", "datasets", "numpy"):
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    return known


@cache
def commit() -> str | None:
    """The commit of this code, with ``+`` when the work tree has changes; None outside a repository.

    It is that of the process's first question: what runs is not what the work tree has become since.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != Path(__file__).resolve().parents[2]:
            return None  # installed inside somebody else's repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
