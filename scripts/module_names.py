"""Writes the names of the linear maps of every shipped model, so that a wrong pattern is refused at once.

Run it after adding a model: python scripts/module_names.py
"""

from __future__ import annotations

import json
import re

from randlora.adapters import unfuse_attention
from randlora.adapters.targets import linear_maps
from randlora.config import CONFIGS, build, settings
from randlora.models.base import ARCHITECTURES


def module_names(names: list[str]) -> list[list]:
    """[template, count] pairs that randlora.models.base.expand turns back into `names`."""
    counts: dict[str, int] = {}
    for name in names:
        template = re.sub(r"\d+", "*", name, count=1)
        counts[template] = counts.get(template, 0) + 1
    return [[template, count if "*" in template else 0] for template, count in counts.items()]


def main() -> None:
    written = set()
    models = sorted(path.stem for path in (CONFIGS / "model").glob("[a-z]*.yaml"))
    for choice in models:
        model = build(settings(f"model={choice}")["model"])
        if model.architecture in written:
            continue  # a tower of a model that has been here
        written.add(model.architecture)
        module = model.meta_model().module
        unfuse_attention(module)
        path = ARCHITECTURES / "module_names" / f"{model.architecture}.json"
        path.write_text(json.dumps(module_names(list(linear_maps(module)))) + "\n")
        print(path.name)


if __name__ == "__main__":
    main()
