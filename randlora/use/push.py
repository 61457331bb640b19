"""A finished run to the Hugging Face hub, with a card made from its record."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import randlora
from randlora.config import build
from randlora.errors import SettingsError
from randlora.models.base import Model, Source
from randlora.records import Result, read
from randlora.studies.collect import without_folders
from randlora.studies.commands import Commands
from randlora.studies.groups import by_settings, spread
from randlora.use.hub import SCHEME, said_of_hub
from randlora.use.trained import Trained


def push(run: Path, repository: str, licence: str | None = None, private: bool = False, peft: bool = False) -> str:
    """Uploads a run: its record without the folders of this machine, its adapter, and a card.

    Args:
        run: The folder of a finished run. Other seeds of the same settings beside it are in the card's deviations.
        repository: ``OWNER/NAME``, made where there is none.
        licence: As the hub calls it, such as ``mit``; None: the card names none.
        private: Whether a repository that is made now is seen by its owner alone.
        peft: Whether PEFT's files are uploaded too, at the top, where PEFT looks for them.

    Returns:
        Where it is.

    Raises:
        SettingsError: The run has not finished, or rests on weights of this machine alone, or the hub refuses.
    """
    from huggingface_hub import HfApi

    result = _finished(run)
    with TemporaryDirectory() as draft:
        folder = Path(draft)
        shutil.copytree(run / "adapter", folder / "adapter")
        _portable(result).write(folder / "result.json", [name for name in result.files if name.startswith("adapter/")])
        if peft:
            randlora.to_peft(Trained.load(run).backbone.module, folder)
        (folder / "README.md").write_text(card(result, _siblings(run, result), repository, licence, peft))
        with said_of_hub(f"cannot push to {repository}"):
            api = HfApi()
            url = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Run {result.signature}")
    return str(url)


def card(result: Result, seeds: list[Result], repository: str, licence: str | None = None, peft: bool = False) -> str:
    """A model card: base, data, scores with deviations, settings, licence, and how to load it.

    Args:
        result: Of the run.
        seeds: All runs of the same settings, this one too.
        repository: Its name on the hub.
        licence: As the hub calls it.
        peft: Whether PEFT can load it.
    """
    from huggingface_hub import ModelCardData

    base = _source(result)
    data = ModelCardData(
        base_model=base.hub, library_name="peft" if peft else "randlora", license=licence,
        tags=["randlora", result.method],
    )  # fmt: skip
    rows = []
    for name in sorted(result.metrics):
        scores = [seed.metrics[name] for seed in seeds if name in seed.metrics]
        rows.append(f"| {name} | {result.metrics[name]:.4f} | {spread(scores, '.4f', '.4f')} | {len(scores)} |")
    budget = {"images per class": result.shots, "part of the training set": result.fraction, **(result.examples or {})}
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repository.rpartition('/')[2]}",
        f"`{result.model}` fine-tuned on `{result.task}` with `{result.method}`: {result.trainable_parameters:,} "
        f"parameters trained in the adapted matrices, {result.head_parameters or 0:,} in a head.",
        f"* Base: {base.words}",
        "* Data: " + ", ".join([f"`{result.task}`", *(f"{key} {n:,}" for key, n in budget.items() if n is not None)]),
        "* Licence: " + (licence or "not stated; that of the base and of the data apply"),
        "## Scores",
        "\n".join(["| score | this run | mean ± deviation | seeds |", "|---|--:|--:|--:|", *rows]),
        "The deviation is over seeds (subsample, order of the data, starting values); the test examples are the same.",
        "## Made by",
        f"```\n{Commands([_portable(result)]).of(_portable(result)).line}\n```",
        f"randlora at commit {result.commit or 'unknown'}, torch {result.versions.get('torch', 'unknown')}, on "
        f"{result.device}; {result.steps} steps in {result.train_seconds or 0:.0f} s.",
        "## Use",
        f"```bash\nrandlora merge {SCHEME}{repository} --into FOLDER\n```",
        f"```python\nfrom randlora.use.trained import Trained\n\ntrained = Trained.load('{SCHEME}{repository}')\n```",
    ]
    if peft:
        parts.append(f"```python\nPeftModel.from_pretrained(base_model, '{repository}')\n```")
    return "\n\n".join(parts) + "\n"


def _finished(run: Path) -> Result:
    result = Result.read(run / "result.json")
    if result.status != "finished":
        raise SettingsError(f"{run}: this run is {result.status}; give its command again to finish it")
    if local := _source(result).local:
        raise SettingsError(
            f"{run} rests on {local}, files of this machine: nobody else could load it. Merge it (randlora merge), or "
            "train on weights of the hub"
        )
    return result


def _source(result: Result) -> Source:
    """Where the weights that the run began with come from."""
    model: Model = build(result.config["model"])
    return model.source()


def _siblings(run: Path, result: Result) -> list[Result]:
    """The runs beside this one that differ in their seed alone, and itself."""
    groups = by_settings(read(run.resolve().parent))
    return next(group for group in groups if any(other.signature == result.signature for other in group))


def _portable(result: Result) -> Result:
    """The record without what belongs to this machine or to whoever watched; data come from the hub elsewhere."""

    def elsewhere(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: elsewhere(item) for key, item in value.items()}
        return None if value == "FOLDER" else value

    result = without_folders(result)
    return replace(result, config=elsewhere({**result.config, "logger": {}}))
