"""Writes the outline of every shipped model: the names of its linear maps, so that a wrong pattern is refused at once.

Run it after adding a model: python scripts/outlines.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from randlora.adapters import open_attention
from randlora.adapters.targets import linear_maps
from randlora.config import build
from randlora.models.base import ARCHITECTURES

CONFIGS = Path(__file__).parent.parent / "configs"


def outline(names: list[str]) -> list[list]:
    """[template, count] pairs that randlora.models.base.expand turns back into `names`."""
    counts: dict[str, int] = {}
    for name in names:
        template = re.sub(r"\d+", "*", name, count=1)
        counts[template] = counts.get(template, 0) + 1
    return [[template, count if "*" in template else 0] for template, count in counts.items()]


def main() -> None:
    models = sorted(path.stem for path in (CONFIGS / "model").glob("[a-z]*.yaml"))
    with initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
        for choice in models:
            config = compose("train", overrides=[f"model={choice}"])
            model = build(OmegaConf.to_container(config.model, resolve=True))
            module = model.skeleton().module
            open_attention(module)
            path = ARCHITECTURES / "outlines" / f"{model.architecture}.json"
            path.write_text(json.dumps(outline(list(linear_maps(module)))) + "\n")
            print(path.name)


if __name__ == "__main__":
    main()
