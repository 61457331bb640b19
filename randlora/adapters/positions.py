"""Where in a transformer a site sits: its block, its role in the attention, and the attention's heads.

Read from names, as the models here and in transformers, timm and open_clip give them: a block is the last numbered
part of a site's name (``encoder.layer.3``), a role is told by what follows. This is the one place that knows them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from randlora.adapters.targets import Place

ROLES = {
    "q": r"q_proj|query|\w+\[q\]",
    "k": r"k_proj|key|\w+\[k\]",
    "v": r"v_proj|value|\w+\[v\]",
    "o": r"o_proj|out_proj|attention\.output\.dense|attn\.proj|attn\.c_proj",
}
_BLOCK = re.compile(r"((?:.*\.)?\d+)\.(.+)")


class Position(NamedTuple):
    """The name of a site's block, and its role there: q, k, v or o."""

    block: str
    role: str


def position(site: str) -> Position | None:
    """Where the site of that name sits; None outside of the attention of a numbered block."""
    numbered = _BLOCK.fullmatch(site)
    if numbered is None:
        return None
    for role, pattern in ROLES.items():
        if re.search(rf"(?:^|\.)(?:{pattern})$", numbered[2]):
            return Position(numbered[1], role)
    return None


def block_of(site: str) -> str | None:
    """The name of the numbered block around the site of that name, if any."""
    numbered = _BLOCK.fullmatch(site)
    return numbered and numbered[1]


def attention_heads(model: nn.Module, places: Iterable[Place]) -> dict[str, int]:
    """The number of attention heads by site: of the nearest module around it that says, or of the model's config."""
    config = getattr(model, "config", None)
    heads = {}
    for place in places:
        parts = place.module.split(".")[:-1]
        around = [model.get_submodule(".".join(parts[:length])) for length in range(len(parts), -1, -1)]
        for source in (*around, config):
            count = getattr(source, "num_heads", None) or getattr(source, "num_attention_heads", None)
            if isinstance(count, int):
                heads[place.site] = count
                break
    return heads
