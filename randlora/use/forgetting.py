"""What training has cost elsewhere: scores on texts and tasks that a run was not trained on, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from randlora.adapters.core import adapted_layers
from randlora.config import leaves
from randlora.data.texts import pad, pad_inputs
from randlora.errors import SettingsError
from randlora.experiment import Experiment
from randlora.records.kept import Reached, first_at
from randlora.records.signature import EXCLUDED_FROM_HASH, modern
from randlora.studies.arms import label_of, varying
from randlora.tasks.language_model import IGNORED, LanguageModel, learned
from randlora.training.evaluate import evaluate, norms, to_device
from randlora.use.retention import SENTENCES
from randlora.use.sample import asked, named
from randlora.use.trained import Base, Trained, experiment_of

RETENTION = "retention"  # what the built-in sentences are called among tasks


def forgetting(
    folders: Sequence[Path], overrides: Sequence[str] = (), texts: Sequence[str] | None = None, base: Base = "same",
    at_scores: Sequence[float] = (), by: str | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Scores of the models of runs, and of the model before training.

    Args:
        folders: Of finished runs of one model and one task.
        overrides: Another task with its settings, whose test set is scored; without them a language model is asked
            about `texts`.
        texts: For a language model; None for SENTENCES.
        base: As `Trained.load` takes it.
        at_scores: Validation scores, at the first evaluated step with which each run is asked, instead of at its end;
            see `randlora.records.kept`.
        by: The validation metric of these scores; None: the task's headline.

    Returns:
        A row for each run, with ``model``, ``task`` (it was trained on), ``run``, ``method``, ``arm`` (the method, and
        what differs between its runs but for the seed), ``seed``, ``on`` (what is scored), ``metric``, ``before``,
        ``after``, ``change`` and ``relative_norm``, the mean of ‖ΔW‖ / ‖W0‖ over its layers. The metric is the other
        task's headline, or ``token_loss``, in nats. With `at_scores` a row for each run and score, with ``at_score``,
        ``by``, ``step`` and ``validation`` too; where no step has reached it, ``validation`` is the best, ``step`` is
        that one's, and ``after``, ``change`` and ``relative_norm`` are None.

    Raises:
        SettingsError: The model has a head, which is its own task's alone; or it writes no texts, and no other task is
            named; or the task is the runs' own; or as `first_at` says.
    """
    runs = named(folders)
    first = experiment_of(folders[0], data=False)
    if overrides and texts is not None:
        raise SettingsError("give texts or another task, not both")
    if overrides and experiment_of(folders[0], overrides, data=False).task.name == first.task.name:
        raise SettingsError(f"task={first.task.name}: the runs were trained on it; name another one")
    if not overrides and first.model.kind != "causal_lm":
        raise SettingsError(
            f"model {first.model.name} gives no probability to texts: name a task that it was not trained on, as task=…"
        )
    if texts is not None and not any(text.strip() for text in texts):
        raise SettingsError("the texts are empty: give at least a sentence")
    named_runs = zip(runs.items(), _arms([experiment_of(folder, data=False) for folder in folders]), strict=True)
    stages = [(*run, arm, stage) for run, arm in named_runs for stage in _stages(run[1], at_scores, by)]
    on, metric, before = _scored(Trained.before(folders[0], bool(overrides), overrides), overrides, texts)
    rows = []
    for name, folder, arm, (score, reached) in stages:
        about: dict[str, Any] = {"model": first.model.name, "task": first.task.name, "run": name, **arm}
        if reached:
            about |= {"at_score": score, "by": by, "step": reached.step, "validation": reached.validation}
        known: dict[str, Any] = {"on": on, "metric": metric, "before": before}
        if reached and reached.adapter is None:
            rows.append(about | known | {"after": None, "change": None, "relative_norm": None})
            continue
        subject = Trained.load(folder, base, bool(overrides), overrides, reached.adapter if reached else None)
        *_, after = _scored(subject, overrides, texts)
        known |= {"after": after, "change": after - before, "relative_norm": _mean_norm(subject)}
        rows.append(about | known)
    return rows


def _arms(experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """The method, the arm and the seed of each."""
    settings = [dict(leaves(modern(experiment.config))) for experiment in experiments]
    methods = [experiment.method.name for experiment in experiments]
    rows = []
    for method, own in zip(methods, settings, strict=True):
        keys = varying([other for name, other in zip(methods, settings, strict=True) if name == method])
        keys = [key for key in keys if key != "seed" and key not in EXCLUDED_FROM_HASH]
        rows.append({"method": method, "arm": label_of(method, own, keys), "seed": own["seed"]})
    return rows


def _stages(folder: Path, at_scores: Sequence[float], by: str | None) -> list[tuple[float | None, Reached | None]]:
    """When a run is asked: its scores and where it has reached them, or at its end."""
    return [(score, first_at(folder, score, by)) for score in at_scores] or [(None, None)]


def token_loss(subject: Trained, texts: Sequence[str], batch_size: int = 16) -> float:
    """The mean cross-entropy of the texts' tokens, each predicted from those before it, in nats.

    Args:
        subject: A causal language model as it is.
        texts: Each by itself; those of fewer than two tokens say nothing.
        batch_size: Texts at a time.
    """
    assert subject.backbone.tokenizer is not None
    tokenizer = subject.backbone.tokenizer()
    items = [tokenizer(text) for text in texts]
    total, count = 0.0, 0
    with asked(subject):
        model = LanguageModel(subject.backbone)
        device = next(model.parameters()).device
        for start in range(0, len(items), batch_size):
            part = items[start : start + batch_size]
            known = learned(pad([item["input_ids"] for item in part], IGNORED))
            inputs = to_device({"inputs": pad_inputs(part, tokenizer.pad_token_id), **known}, device)
            tokens = len(known["targets"])
            total += float(model(**inputs)) * tokens
            count += tokens
    if not count:
        raise SettingsError("the texts have a token each at most: there is nothing to predict")
    return total / count


def _scored(subject: Trained, overrides: Sequence[str], texts: Sequence[str] | None) -> tuple[str, str, float]:
    """What is scored, by which metric, and the score."""
    experiment = subject.experiment
    if subject.bound.head is not None:
        raise SettingsError(
            f"task {experiment.task.name} puts a head on {experiment.model.name}, trained for that task alone: "
            "there is no score before training; choose runs of a model without a head, such as CLIP or a language model"
        )
    if not overrides:
        return RETENTION if texts is None else "texts", "token_loss", token_loss(subject, texts or SENTENCES)
    task, trainer = experiment.task, experiment.trainer
    metrics = evaluate(
        task, subject.bound.model, task.splits(subject.backbone, experiment.budget).test, trainer.accelerator(),
        batch_size=trainer.evaluation_batch_size, workers=trainer.workers, precision=trainer.precision,
    )  # fmt: skip
    return task.name, task.headline, metrics[task.headline]


def _mean_norm(subject: Trained) -> float:
    module = subject.backbone.module
    return norms(module)["update/relative_norm_mean"] if adapted_layers(module) else 0.0
