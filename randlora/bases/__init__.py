"""The fixed random matrices that updates are made of."""

from randlora.bases.dense import DISTRIBUTIONS, DenseBasis, check_distribution, draw

__all__ = ["DISTRIBUTIONS", "DenseBasis", "check_distribution", "draw"]
