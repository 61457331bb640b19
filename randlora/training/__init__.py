"""Optimisation, evaluation, schedules, checkpoints."""

from randlora.training.optimizers import Optimizer
from randlora.training.trainer import Diverged, Fit, Interrupted, Trainer

__all__ = ["Diverged", "Fit", "Interrupted", "Optimizer", "Trainer"]
