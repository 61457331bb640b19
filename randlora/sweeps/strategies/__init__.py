"""How a search goes: what is tried next and what is chosen, from the scores that are known and from nothing else.

So a search that was killed goes on as if it had not been: the same scores make the same plan. In one cell, which is a
task, a model and a budget of examples, all arms (methods, or settings of one) have as many trials of as many steps.
"""

from randlora.sweeps.strategies.base import RATE, WORST, Arm, Course, Score, Strategy, Values
from randlora.sweeps.strategies.grid import Grid, Halving
from randlora.sweeps.strategies.tpe import TPE, require_optuna

__all__ = [
    "RATE", "TPE", "WORST", "Arm", "Course", "Grid", "Halving", "Score", "Strategy", "Values", "require_optuna",
]  # fmt: skip
