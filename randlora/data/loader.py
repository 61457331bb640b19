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
from randlora.rng import integer, permutation

Item = Mapping[str, Any]


class Encoder:
    """From an example of a source to an item, and from items to a batch; picklable, since workers run it."""

    random = False  # whether an example may be encoded differently each time

    @staticmethod
    def length(item: Item) -> int:
        """By which items are put together, so that little is padded; all alike where nothing is."""
        return 0

    def __call__(self, example: Item) -> Item:
        raise NotImplementedError

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        """A batch. Tensors in it are moved to the device; here every field is stacked."""
        return {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in items[0]}


class Unreadable(RuntimeError):
    """More examples of a split cannot be read than its settings allow."""


class Skipped(NamedTuple):
    """In an example's place: its row in the table, and why it cannot be read, or is refused."""

    row: int
    reason: str | SettingsError


class Split(Dataset):
    """Chosen rows of a table, encoded when read. A key is (row, position in the run).

    `tolerance` is the largest share of the rows that may be unreadable; they are left out of their batches.
    """

    def __init__(
        self,
        table: Table,
        rows: np.ndarray,
        encode: Encoder,
        augment_seed: int | None = None,
        tolerance: float = 0.0,
    ):
        self.table, self.rows, self.encode, self.augment_seed = table, rows, encode, augment_seed
        self.tolerance = tolerance
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
        self, items: Sequence[Item | Skipped], most: int | None = None
    ) -> tuple[list[dict[str, Any]], list[Skipped]]:
        """Batches of `most` of the items that could be read (None: one of all), and the items that could not.

        Items of like length share a batch; which items come together in a step does not change.
        """
        skipped = [item for item in items if isinstance(item, Skipped)]
        readable = sorted((item for item in items if not isinstance(item, Skipped)), key=self.encode.length)
        size = most or max(1, len(readable))
        batches = [self.encode.collate(readable[i : i + size]) for i in range(0, len(readable), size)]
        return batches, skipped

    @cached_property
    def by_length(self) -> Sequence[int]:
        """The split's positions, the longest first, for reading it through once; in order where nothing has length."""
        if type(self.encode).length is Encoder.length:
            return range(len(self))
        items = [self[position, position] for position in range(len(self))]
        lengths = [0 if isinstance(item, Skipped) else self.encode.length(item) for item in items]
        return sorted(range(len(self)), key=lambda position: -lengths[position])

    def skip(self, one: Skipped, say: Callable[[str], None]) -> None:
        """Notes an unreadable example, aloud the first time; Unreadable when there are too many.

        SettingsError for one that the settings refuse.
        """
        if isinstance(one.reason, SettingsError):
            raise one.reason
        if one.row in self.skipped:
            return
        self.skipped[one.row] = one.reason
        sentence = f"example {one.row} cannot be read ({one.reason})"
        if len(self.skipped) > self.tolerance * len(self):
            raise Unreadable(
                f"{sentence}: {len(self.skipped)} of {len(self):,}, more than task.unreadable={self.tolerance} allows"
            )
        say(f"{sentence} and is left out: {len(self.skipped)} of {len(self):,} so far")

    def _read(self, index: int, position: int) -> Item:
        example = self.table[index]
        if self.augment_seed is None:
            return self.encode(example)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(integer("augmentation", self.augment_seed, position))
            return self.encode(example)


def training_keys(
    count: int, batch_size: int, steps: range, seed: int, rank: int = 0, world: int = 1
) -> Iterator[list[tuple[int, int]]]:
    """This process's share of (row, position), step after step.

    Epochs follow each other without a seam: step s has positions s·batch_size to (s + 1)·batch_size, position p is
    entry p mod count of the permutation of epoch p div count. Every step is full.
    """
    order = lru_cache(maxsize=2)(lambda epoch: permutation(count, "order", seed, epoch))
    for step in steps:
        positions = range(step * batch_size + rank, (step + 1) * batch_size, world)
        yield [(int(order(p // count)[p % count]), p) for p in positions]


def evaluation_keys(
    order: Sequence[int], batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[list[tuple[int, int]]]:
    """This process's share of every row once, in the order given."""
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
    """For every entry of `keys` its batches of `micro_batch_size` (None: one), without unreadable examples.

    `say` hears of those; Unreadable if too many are.
    """
    batches = DataLoader(
        split,
        batch_sampler=list(keys),
        collate_fn=partial(split.collate, most=micro_batch_size),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
    )
    # Begun here and not at the first batch: it draws from torch's generator, which a step seeds for its own noise.
    return _readable(split, iter(batches), say)


def _readable(
    split: Split, batches: Iterator[tuple[list[dict[str, Any]], list[Skipped]]], say: Callable[[str], None]
) -> Iterator[list[dict[str, Any]]]:
    for micro, skipped in batches:
        for one in skipped:
            split.skip(one, say)
        if not micro:
            raise Unreadable(f"a whole batch cannot be read, such as example {skipped[0].row}")
        yield micro
