"""A run on the Hugging Face hub, by ``hub:OWNER/NAME``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from randlora.errors import SettingsError

SCHEME = "hub:"
FILES = ("result.json", "adapter/*")


def local(run: Path | str) -> Path:
    """The folder of a run; one that is named ``hub:OWNER/NAME`` or ``hub:OWNER/NAME@REVISION`` is fetched.

    Raises SettingsError where the hub does not give it.
    """
    if not str(run).startswith(SCHEME):
        return Path(run)
    from huggingface_hub import HfApi

    repository, _, revision = str(run).removeprefix(SCHEME).partition("@")
    with said_of_hub(f"cannot fetch {run}"):
        return Path(HfApi().snapshot_download(repository, revision=revision or None, allow_patterns=[*FILES]))


@contextmanager
def said_of_hub(attempt: str) -> Iterator[None]:
    """Makes a SettingsError of what the hub answers, or of its silence."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SettingsError(
            f"{attempt}: {reason} (`hf auth login` logs in; HF_ENDPOINT is the hub's address)"
        ) from error
