"""Files that are whole and unchanged: written atomically, and sealed by a manifest of sizes and SHA-256.

``manifest.json`` in a folder lists the size in bytes and the SHA-256 of each sealed file, and the SHA-256 of that list.
It detects damage (flipped bits, truncation, a lost or exchanged file), not forgery: nothing is signed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from randlora.errors import SettingsError

MANIFEST = "manifest.json"
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
DRAFT = ".draft_"  # what the names of half-written files and folders begin with


class Damaged(SettingsError):
    """A file is not what was written: a sentence with its name and what is wrong with it."""


def write(path: Path, content: str | bytes) -> None:
    """Writes a file that appears whole or not at all, whatever ends the process, and is on the disk on return."""
    draft = path.with_name(f"{DRAFT}{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def draft_folder(folder: Path, name: str) -> Iterator[Path]:
    """A new folder in `folder` for files that are not to be seen yet; it is gone at the end, unless it was renamed."""
    path = folder / f"{DRAFT}{name}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """`write` of plain data, with its own SHA-256 beside it."""
    write(path, json.dumps(dict(content) | {"sha256": digest(content)}, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` was given; Damaged where the file is missing or is not what was written."""
    try:
        content = json.loads(path.read_text())
        expected = content.pop("sha256")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from error
    if digest(content) != expected:
        raise Damaged(f"{path} is damaged: its SHA-256 is not that of its content")
    return content


def digest(content: Mapping[str, Any]) -> str:
    """The SHA-256 of plain data, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seal(folder: Path, files: Iterable[str]) -> None:
    """Writes manifest.json for these files of a folder; they, the manifest and the folder are on the disk on return."""
    entries: dict[str, dict[str, int | str]] = {}
    for name in sorted(files):
        sync(folder / name)
        entries[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    write(folder / MANIFEST, _manifest(entries))


def verify(folder: Path, needed: Iterable[str] = ()) -> None:
    """Raises Damaged unless the folder's manifest and every file it lists are as sealed, and it lists all `needed`."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise Damaged(f"{path} is missing") from error
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from error
    try:
        entries = json.loads(text)["files"]
        whole = _manifest(entries).encode() == text
        sealed = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} is damaged: it is no manifest") from error
    if not whole:
        raise Damaged(f"{path} is damaged: its list of files is not that of its own SHA-256")
    for name in needed:
        if name not in sealed:
            raise Damaged(f"{path} does not list {name}")
    for name, (size, digest) in sealed.items():
        verify_file(folder / name, digest, size)


def disk_fault(error: BaseException) -> str | None:
    """In the system's words what is wrong with the disk, full or read-only and the like, if an error says that.

    safetensors writes natively, and has the system's error in the text of its own.
    """
    native = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(native[1]) if native else None
    return os.strerror(number) if number in _DISK_FAULTS else None


def remove_drafts(folder: Path) -> None:
    """Removes what a writer that was killed has left half-written directly in `folder`."""
    for path in folder.glob(f"{DRAFT}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify_file(path: Path, digest: str, size: int | None = None) -> None:
    """Raises Damaged unless a file has this SHA-256, and this many bytes where they are known."""
    try:
        present = path.stat().st_size
        if size not in (None, present):
            raise Damaged(f"{path} is damaged: it has {present:,} bytes, and {size:,} were written")
        if sha256(path) != digest:
            raise Damaged(f"{path} is damaged: its SHA-256 is not that of what was written")
    except FileNotFoundError as error:
        raise Damaged(f"{path} is missing") from error
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from error


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(entries: Mapping[str, Mapping[str, int | str]]) -> str:
    """The text of the manifest, the only one for these entries."""
    digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return json.dumps({"files": entries, "sha256": digest}, indent=1) + "\n"
