"""Order and batches: position p of a run is the same example on every machine, with any number of workers."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from randlora.data.sources import Table
from randlora.errors import SettingsError
from randlora.rng import draws, integer, permutation
from randlora.signals import leave_signals_to_parent

Item = Mapping[str, Any]


class Encoder:
    """From an example of a source to an item, and from items to a batch; picklable, since workers run it."""

    random = False  # whether an example may be encoded differently each time

    @staticmethod
    def length(item: Item) -> int:
        """By which items are put together, so that little is padded; 0 for all where nothing is."""
        return 0

    def __call__(self, example: Item) -> Item:
        """The item of one example; SettingsError for an example that the settings refuse."""
        raise NotImplementedError

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        """A batch of items with the same fields, each stacked to (B, …). Tensors are moved to the device later."""
        return {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in items[0]}


class Unreadable(RuntimeError):
    """More examples of a split cannot be read than its settings allow."""


class Skipped(NamedTuple):
    """In an example's place: its row in the table, and why it cannot be read, or is refused."""

    row: int
    reason: str | SettingsError


class Split(Dataset):
    """Chosen rows of a table, encoded when read. A key is (index into `rows`, position in the run).

    A batch has what the encoder's collate puts there, and ``row``, each example's in the table, int64 (B,).

    Args:
        table: the examples.
        rows: int64 (N,), which of them and in which order.
        encode: from an example to an item.
        augment_seed: with the position, the seed of what `encode` draws; None where it draws nothing.
        tolerance: the largest share of the rows that may be unreadable; they are left out of their batches.
    """

    def __init__(
        self, table: Table, rows: np.ndarray, encode: Encoder, augment_seed: int | None = None, tolerance: float = 0.0
    ):
        self.table, self.rows, self.encode = table, rows, encode
        self.augment_seed, self.tolerance = augment_seed, tolerance
        self.skipped: dict[int, str] = {}  # what `loader` has left out so far

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> Item | Skipped:
        index = int(self.rows[key[0]])
        try:
            return self._read(index, key[1])
        except (OSError, SyntaxError, struct.error) as error:  # what PIL raises for damaged files
            return Skipped(index, f"{type(error).__name__}: {error}")
        except SettingsError as error:  # out of a worker it would come with the worker's trace
            return Skipped(index, error)

    def collate(
        self, items: Sequence[Item | Skipped], size: int | None = None
    ) -> tuple[list[dict[str, Any]], list[Skipped]]:
        """The items of a step as batches of `size` (None: one of all), and the examples that could not be read.

        Items of like length share a batch; which items come together in a step does not change.
        """
        skipped = [item for item in items if isinstance(item, Skipped)]
        readable = sorted((item for item in items if not isinstance(item, Skipped)), key=self.encode.length)
        size = size or max(1, len(readable))
        parts = [readable[i : i + size] for i in range(0, len(readable), size)]
        rows = [torch.tensor([item["row"] for item in part]) for part in parts]
        return [{**self.encode.collate(part), "row": row} for part, row in zip(parts, rows, strict=True)], skipped

    @cached_property
    def by_length(self) -> Sequence[int]:
        """The split's positions, the longest first, for reading it through once; in order where nothing has length."""
        if type(self.encode).length is Encoder.length:
            return range(len(self))
        items = [self[position, position] for position in range(len(self))]
        lengths = [0 if isinstance(item, Skipped) else self.encode.length(item) for item in items]
        return sorted(range(len(self)), key=lambda position: -lengths[position])

    def skip(self, example: Skipped, say: Callable[[str], None]) -> None:
        """Notes an example that is left out, aloud the first time.

        Raises:
            Unreadable: there are too many of them.
            SettingsError: the settings refuse the example.
        """
        if isinstance(example.reason, SettingsError):
            raise example.reason
        if example.row in self.skipped:
            return
        self.skipped[example.row] = example.reason
        sentence = f"example {example.row} cannot be read ({example.reason})"
        if len(self.skipped) > self.tolerance * len(self):
            raise Unreadable(
                f"{sentence}: {len(self.skipped)} of {len(self):,}, more than task.unreadable={self.tolerance} allows"
            )
        say(f"{sentence} and is left out: {len(self.skipped)} of {len(self):,} so far")

    def _read(self, index: int, position: int) -> Item:
        example = self.table[index]
        if self.augment_seed is None:
            return {"row": index, **self.encode(example)}
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: it seeds devices too, where a step's noise is drawn, or formats a stack for later.
            torch.default_generator.manual_seed(integer("augmentation", self.augment_seed, position))
            return {"row": index, **self.encode(example)}


def training_keys(
    count: int, batch_size: int, steps: range, seed: int, rank: int = 0, world: int = 1, replacement: bool = False
) -> Iterator[list[tuple[int, int]]]:
    """This process's share of the keys (row, position) of a split, a list per step.

    Epochs follow each other without a seam: step s has positions s·batch_size to (s + 1)·batch_size, position p is
    entry p mod count of the permutation of epoch p div count. Every step is full.

    Args:
        count: the rows of the split.
        batch_size: of a step, over all processes.
        steps: which steps of the run.
        seed: of the permutations.
        rank: of this process.
        world: how many processes share a step.
        replacement: whether every entry of an epoch is any row instead, so that some come twice and some not at all.
    """
    draw = draws if replacement else permutation
    order = lru_cache(maxsize=2)(lambda epoch: draw(count, "order", seed, epoch))
    for step in steps:
        positions = range(step * batch_size + rank, (step + 1) * batch_size, world)
        yield [(int(order(p // count)[p % count]), p) for p in positions]


def evaluation_keys(
    order: Sequence[int], batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[list[tuple[int, int]]]:
    """This process's share of the rows `order`, each once and in that order, as keys (row, row) in batches."""
    rows = order[rank::world]
    for start in range(0, len(rows), batch_size):
        yield [(row, row) for row in rows[start : start + batch_size]]


def loader(
    split: Split,
    keys: Iterator[list[tuple[int, int]]],
    workers: int,
    say: Callable[[str], None] = print,
    micro_batch_size: int | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """For every entry of `keys` its batches, without unreadable examples.

    Keys are drawn as batches are read, no more than four steps a worker ahead: a run's length costs nothing.

    Args:
        split: what the keys are of.
        keys: the keys of a step or a batch, one list after the other.
        workers: processes that read and encode; 0 for this one.
        say: hears of examples that cannot be read.
        micro_batch_size: the examples of a batch; None for all of a step.

    Raises:
        Unreadable: too many examples cannot be read, or none of a step.
        SettingsError: the settings refuse an example.
    """
    batches = DataLoader(
        split,
        batch_sampler=keys,
        collate_fn=partial(split.collate, size=micro_batch_size),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
        worker_init_fn=leave_signals_to_parent,
    )
    # Begun here and not at the first batch: it draws from torch's generator, which a step seeds for its own noise.
    return _readable(split, iter(batches), say)


def _readable(
    split: Split, batches: Iterator[tuple[list[dict[str, Any]], list[Skipped]]], say: Callable[[str], None]
) -> Iterator[list[dict[str, Any]]]:
    for step, skipped in batches:
        for example in skipped:
            split.skip(example, say)
        if not step:
            raise Unreadable(f"a whole batch cannot be read, such as example {skipped[0].row}")
        yield step
