"""Optimisation, evaluation, schedules, checkpoints."""

from randlora.signals import Interrupted
from randlora.training.optimizers import Optimizer
from randlora.training.outcome import Diverged, Fit
from randlora.training.trainer import Trainer

__all__ = ["Diverged", "Fit", "Interrupted", "Optimizer", "Trainer"]
