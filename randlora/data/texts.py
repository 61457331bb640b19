"""Texts to padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """int64 (rows, longest), short rows filled with `value` on the right or left `side`."""
    longest = max(len(row) for row in rows)
    filled = []
    for row in rows:
        fill = [value] * (longest - len(row))
        filled.append([*row, *fill] if side == "right" else [*fill, *row])
    return torch.tensor(filled, dtype=torch.int64)


def pad_inputs(items: Sequence[dict[str, Any]], pad_id: int, side: str = "right") -> dict[str, Tensor]:
    """input_ids, attention_mask and token_type_ids, whichever the items have, each int64 (B, longest).

    Args:
        items: what a tokenizer gives for every text.
        pad_id: the token that fills input_ids; the other fields are filled with 0.
        side: where short texts are filled, right or left.
    """
    values = {"input_ids": pad_id, "attention_mask": 0, "token_type_ids": 0}
    return {key: pad([item[key] for item in items], value, side) for key, value in values.items() if key in items[0]}
