"""Order and batches: position p of a run is the same example on every machine, with any number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from randlora.data.sources import Table
from randlora.streams import integer, permutation

Item = Mapping[str, Any]


class Encoder:
    """From an example of a source to an item, and from items to a batch; picklable, since workers run it."""

    def __call__(self, example: Item) -> Item:
        raise NotImplementedError

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        """A batch. Tensors in it are moved to the device; here every field is stacked."""
        return {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in items[0]}


class Split(Dataset):
    """Chosen rows of a table, encoded when read. A key is (row, position in the run)."""

    def __init__(self, table: Table, rows: np.ndarray, encode: Encoder, augment_seed: int | None = None):
        self.table, self.rows, self.encode, self.augment_seed = table, rows, encode, augment_seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        row, position = key
        example = self.table[int(self.rows[row])]
        if self.augment_seed is None:
            return self.encode(example)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(integer("augmentation", self.augment_seed, position))
            return self.encode(example)


def training_keys(
    count: int, batch_size: int, micro_batch_size: int, steps: range, seed: int, rank: int = 0, world: int = 1
) -> Iterator[list[tuple[int, int]]]:
    """This process's micro-batches of (row, position), step after step.

    Epochs follow each other without a seam: step s has positions s·batch_size to (s + 1)·batch_size, position p is
    entry p mod count of the permutation of epoch p div count. Every step is full.
    """
    order = lru_cache(maxsize=2)(lambda epoch: permutation(count, "order", seed, epoch))
    for step in steps:
        positions = range(step * batch_size + rank, (step + 1) * batch_size, world)
        for start in range(0, len(positions), micro_batch_size):
            chunk = positions[start : start + micro_batch_size]
            yield [(int(order(p // count)[p % count]), p) for p in chunk]


def evaluation_keys(count: int, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[list[tuple[int, int]]]:
    """This process's share of every row once, in order."""
    rows = range(rank, count, world)
    for start in range(0, len(rows), batch_size):
        yield [(row, row) for row in rows[start : start + batch_size]]


def loader(split: Split, keys: Iterator[list[tuple[int, int]]], workers: int) -> DataLoader:
    """A DataLoader over the batches of `keys`."""
    return DataLoader(
        split,
        batch_sampler=list(keys),
        collate_fn=split.encode.collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
    )
