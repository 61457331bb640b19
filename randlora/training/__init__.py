"""The loop, its schedule, its checkpoints."""

from randlora.training.trainer import Diverged, Fit, Interrupted, Trainer

__all__ = ["Diverged", "Fit", "Interrupted", "Trainer"]
