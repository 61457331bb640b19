"""Sealed folders: what is damaged is found and named."""

import errno
import os
import random
from pathlib import Path

import pytest
from safetensors import SafetensorError

from randlora.integrity import (
    MANIFEST,
    Damaged,
    disk_fault,
    read_json,
    remove_drafts,
    seal,
    verify,
    write,
    write_json,
)


@pytest.fixture
def sealed(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(200)))
    (tmp_path / "b.json").write_text('{"x": 1}')
    (tmp_path / "notes.txt").write_text("not sealed")
    seal(tmp_path, ["b.json", "a.bin"])
    return tmp_path


def test_json_with_its_checksum(tmp_path: Path) -> None:
    """Whatever byte is changed, it is damage."""
    path = tmp_path / "file.json"
    content = {"ranks": [1, 20], "rate": 2.5, "name": None}
    write_json(path, content)
    text = path.read_bytes()
    assert read_json(path) == content
    for position in range(len(text)):
        path.write_bytes(text[:position] + bytes([text[position] ^ 1]) + text[position + 1 :])
        with pytest.raises(Damaged, match=str(path)):
            read_json(path)
    path.unlink()
    with pytest.raises(Damaged, match=str(path)):
        read_json(path)


def test_faults_of_the_disk() -> None:
    full = "No space left on device"
    assert disk_fault(OSError(errno.ENOSPC, full)) == full
    assert disk_fault(SafetensorError(f"Error while serializing: I/O error: {full} (os error 28)")) == full
    assert disk_fault(OSError(errno.ENOENT, "missing")) is None
    assert disk_fault(ValueError("28")) is None


def test_an_unchanged_folder_is_valid(sealed):
    verify(sealed, ["a.bin", "b.json"])
    (sealed / "notes.txt").unlink()
    verify(sealed)
    with pytest.raises(Damaged, match=r"manifest.json does not list notes.txt"):
        verify(sealed, ["notes.txt"])


def test_every_flipped_bit_is_named(sealed):
    """Of the manifest too: where a bit of it is wrong, it is what is damaged, and not the file it speaks of."""
    rng = random.Random(0)
    for name in ("a.bin", "b.json", MANIFEST):
        content = (sealed / name).read_bytes()
        for _ in range(100):
            flipped = bytearray(content)
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            (sealed / name).write_bytes(flipped)
            with pytest.raises(Damaged, match=name):
                verify(sealed)
        (sealed / name).write_bytes(content)
    verify(sealed)


@pytest.mark.parametrize("name", ["a.bin", "b.json", MANIFEST])
def test_truncated_lost_and_exchanged_files_are_named(sealed, name):
    path = sealed / name
    content = path.read_bytes()
    for end in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(Damaged, match=name):
            verify(sealed)
    for other in {"a.bin", "b.json", "notes.txt", MANIFEST} - {name}:
        path.write_bytes((sealed / other).read_bytes())
        with pytest.raises(Damaged, match=name):
            verify(sealed)
    path.write_bytes(content + b" ")
    with pytest.raises(Damaged, match=name):
        verify(sealed)
    path.unlink()
    with pytest.raises(Damaged, match=f"{name} is missing"):
        verify(sealed)
    path.mkdir()
    with pytest.raises(Damaged, match=name):
        verify(sealed)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(path, "new")
    assert {path: path.read_text() for path in tmp_path.iterdir()} == {path: "old"}


def test_drafts_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / ".draft_step").mkdir()
    (tmp_path / ".draft_step" / "tensors").touch()
    (tmp_path / ".draft_result.json.77").touch()
    (tmp_path / "result.json").touch()
    remove_drafts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
