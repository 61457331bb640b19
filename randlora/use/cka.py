"""How alike two models' features are, layer by layer: linear CKA from batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randlora.adapters.attention import unfuse_attention
from randlora.adapters.core import adapted_layers
from randlora.errors import SettingsError
from randlora.tasks.base import Batch
from randlora.use.sample import BASE, Sample, asked, batches, load, named
from randlora.use.trained import Base, Trained

LEAST = 4  # examples of a batch, below which HSIC has no unbiased estimate


def cka_of_runs(
    folders: Sequence[Path],
    sample: Sample | None = None,
    layers: Sequence[str] = (),
    base: Base = "same",
    overrides: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Linear CKA of every run's features, and of the frozen model's, with those of the first run.

    One model is loaded at a time; of each, the Gram matrices of its batches are kept.

    Args:
        folders: Of finished runs of one model and task.
        sample: The examples. Those that do not fill a batch are left out.
        layers: fnmatch patterns on names of modules; without, the adapted layers of the first run.
        base: As `Trained.load` takes it.
        overrides: A task and settings in place of the runs' own.

    Returns:
        Rows with ``model``, ``task``, ``layer``, ``run`` and ``against``, the two names, and ``cka``. Layers that see
        no examples, such as those of CLIP's text tower, have none.

    Raises:
        SettingsError: The runs are of several models or tasks, no layer is named, or there are too few examples.
    """
    sample = sample or Sample()
    if sample.batch_size < LEAST:
        raise SettingsError(f"batch_size={sample.batch_size}: unbiased HSIC needs {LEAST} examples a batch or more")
    runs = named(folders, overrides)
    reference, *others = [*runs, BASE]
    subject = load(reference, runs, base, overrides)
    names = _chosen(subject.backbone.module, layers)
    examples = [batch for batch in batches(subject, sample) if len(batch["row"]) == sample.batch_size]
    if not examples:
        raise SettingsError(f"batch_size={sample.batch_size}: there are fewer examples than that; choose a smaller one")
    first = gram_matrices(subject, examples, names)
    rows = []
    for name in others:
        subject = load(name, runs, base, overrides)
        for layer, grams in gram_matrices(subject, examples, names).items():
            rows.append({
                "model": subject.experiment.model.name, "task": subject.experiment.task.name, "layer": layer,
                "run": name, "against": reference, "cka": cka(first[layer], grams),
            })  # fmt: skip
    return rows


def gram_matrices(subject: Trained, examples: Sequence[Batch], names: Sequence[str]) -> dict[str, Tensor]:
    """X Xᵀ of every batch by layer, float64 (batches, n, n), with the rows of X an example's features in one vector.

    Where inputs are padded, the features of what pads are zero. A layer that does not see every batch is left out.
    """
    module, task = subject.backbone.module, subject.experiment.task
    if not adapted_layers(module):
        unfuse_attention(module)  # so that its layers are those of the adapted models
    known = dict(module.named_modules())
    kept: dict[str, list[Tensor]] = {name: [] for name in names if name in known}
    with asked(subject) as model:
        task.loss(model, examples[0])  # what is computed but once, such as the features of class names, is
        for batch in examples:
            seen: dict[str, Tensor] = {}
            hooks = [known[name].register_forward_hook(partial(_keep, seen, name)) for name in kept]
            try:
                task.loss(model, batch)
            finally:
                for hook in hooks:
                    hook.remove()
            for name, features in seen.items():
                if features.shape[0] == len(batch["row"]):
                    kept[name].append(_gram(_unpadded(features, batch)).cpu())
    return {name: torch.stack(grams) for name, grams in kept.items() if len(grams) == len(examples)}


def hsic(K: Tensor, L: Tensor) -> Tensor:
    """The unbiased estimate HSIC₁ of Song et al. (2012), as Nguyen et al. have it (ICLR 2021, equation 3).

    Args:
        K: Symmetric, (…, n, n) with n of at least LEAST.
        L: As K.

    Returns:
        An estimate for each pair, (…).
    """
    n = K.shape[-1]
    off = 1 - torch.eye(n, dtype=K.dtype, device=K.device)
    K, L = K * off, L * off
    sums_K, sums_L = K.sum(-1), L.sum(-1)
    trace, product = (K * L).sum((-2, -1)), sums_K.sum(-1) * sums_L.sum(-1)
    across = (sums_K * sums_L).sum(-1)
    return (trace + product / ((n - 1) * (n - 2)) - 2 * across / (n - 2)) / (n * (n - 3))


def cka(K: Tensor, L: Tensor) -> float:
    """CKA from batches, (batches, n, n) each: every HSIC a mean over batches (Nguyen et al., equation 2)."""
    cross, one, other = (hsic(*pair).mean() for pair in ((K, L), (K, K), (L, L)))
    return (cross / (one * other).sqrt()).item()


def _chosen(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    if not patterns:
        return list(adapted_layers(module))
    names = [name for name, _ in module.named_modules() if name and any(fnmatchcase(name, p) for p in patterns)]
    if not names:
        raise SettingsError(f"layers={', '.join(patterns)}: no module has such a name; see randlora.adapt's targets")
    return names


def _keep(seen: dict[str, Tensor], name: str, module: nn.Module, inputs: object, output: Any) -> None:
    seen[name] = output[0] if isinstance(output, tuple) else output


def _unpadded(features: Tensor, batch: Batch) -> Tensor:
    inputs = batch.get("inputs")
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is None or features.shape[:2] != mask.shape:
        return features
    return features * mask.unflatten(1, (-1, *[1] * (features.dim() - 2))).to(features.dtype)


def _gram(features: Tensor) -> Tensor:
    flat = features.flatten(1).double()
    return flat @ flat.T
