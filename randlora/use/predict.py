"""What a classifier that a run has trained says of images and texts that it has not seen."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from randlora.adapters import merged
from randlora.data.loader import Split, evaluation_keys, loader
from randlora.data.sources import FILES, HubTable, Table, read_file
from randlora.errors import SettingsError
from randlora.tasks import ImageClassification
from randlora.tasks.mixins import Classifies
from randlora.training.evaluate import to_device
from randlora.training.precision import attention_rule, autocast
from randlora.use.trained import Trained

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def predict(trained: Trained, inputs: Sequence[Path], batch_size: int = 64) -> Iterator[dict[str, Any]]:
    """What is said of each input, in order.

    Args:
        trained: A classifier, or a regression.
        inputs: Images and folders of images; or one file of FILES, whose rows are inputs: for a task on texts with its
            columns, for one on images with a column `image` of paths.
        batch_size: Inputs at a time.

    Yields:
        ``input`` (an image's path, a row's number), and ``label``, ``score`` (its probability) and ``scores`` (of each
        class); for a regression ``value``.

    Raises:
        SettingsError: The run's task has no classes and no numbers, or there is nothing to read.
        Unreadable: An image is damaged.
    """
    task, model = trained.experiment.task, trained.bound.model
    if not isinstance(task, Classifies):
        raise SettingsError(f"task {task.name} writes texts: ask it by randlora generate")
    names = task.names() if task.classifies else []
    table = _inputs(inputs, [*getattr(task, "texts", ["image"])], isinstance(task, ImageClassification))
    trainer = trained.experiment.trainer
    device = trainer.accelerator().device
    split = Split(table, np.arange(len(table)), task.encoder(trained.backbone, training=False))
    model.to(device).eval()
    rules = attention_rule(device.type, trainer.precision), autocast(device.type, trainer.precision)
    with merged(model), rules[0], rules[1], torch.no_grad():  # as the run was scored
        for batches in loader(split, evaluation_keys(range(len(table)), batch_size), workers=0):
            said: dict[int, torch.Tensor] = {}  # examples of like length share a batch
            for batch in batches:
                outputs = task.outputs(model, to_device(batch, device)).cpu()
                said.update(zip(batch["row"].tolist(), outputs, strict=True))
            for row, output in sorted(said.items()):
                yield {"input": table.name_of(row), **_named(output, names)}


def _named(output: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
    if not names:
        return {"value": output.item()}
    scores = output.softmax(-1).tolist()
    best = max(range(len(names)), key=scores.__getitem__)
    return {"label": names[best], "score": scores[best], "scores": dict(zip(names, scores, strict=True))}


def written(rows: Iterable[Mapping[str, Any]], ending: str) -> str:
    """Predictions as JSON lines or, for ``.csv``, as a table with a column for each class's score."""
    if ending != ".csv":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return table_of([
        {key: value for key, value in row.items() if key != "scores"}
        | {f"score {name}": score for name, score in row.get("scores", {}).items()}
        for row in rows
    ])  # fmt: skip


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class _Inputs:
    """A table of inputs, whose labels are not known and are 0."""

    def __init__(
        self,
        names: Sequence[str | int],
        columns: Sequence[str],
        table: Table | None = None,
        folder: Path | None = None,
    ):
        self.names, self.columns, self.table, self.folder = names, list(columns), table, folder

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        from PIL import Image

        example = {"image": self.names[index]} if self.table is None else self.table[index]
        if self.columns == ["image"] and isinstance(path := example["image"], str):
            example = {**example, "image": Image.open(path if self.folder is None else self.folder / path)}
        for column in self.columns:
            if not isinstance(example[column], Image.Image if column == "image" else str):
                raise SettingsError(
                    f"row {index} has {example[column]!r:.60} as {column}: give "
                    f"{'the path of an image' if column == 'image' else 'a text'}"
                )
        return {**example, "label": 0}

    def column(self, name: str) -> np.ndarray:
        raise NotImplementedError("a classifier's inputs are read one by one")

    def name_of(self, row: int) -> str | int:
        """An image's path, or a row's number."""
        return self.names[row]


def _inputs(inputs: Sequence[Path], columns: Sequence[str], images: bool) -> _Inputs:
    missing = next((path for path in inputs if not path.exists()), None)
    if missing is not None or not inputs:
        raise SettingsError(f"{missing or 'no input'}: give files that are there")
    if len(inputs) == 1 and inputs[0].suffix in FILES:
        table = HubTable(read_file(inputs[0]))
        for column in columns:
            table.check_column(column)
        return _Inputs(range(len(table)), columns, table, inputs[0].parent)
    if not images:
        raise SettingsError(f"{inputs[0]}: give one file of texts ({', '.join(FILES)}) with {', '.join(columns)}")
    paths = [path for given in inputs for path in (sorted(given.rglob("*")) if given.is_dir() else [given])]
    paths = [path for path in paths if path.suffix.lower() in IMAGES]
    if not paths:
        raise SettingsError(f"{inputs[0]}: no image there ({', '.join(IMAGES)})")
    return _Inputs([str(path) for path in paths], columns)
