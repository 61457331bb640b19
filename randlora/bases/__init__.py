"""The fixed random matrices that updates are made of."""

from randlora.bases.dense import DenseBasis, DenseMap, SparseMap
from randlora.bases.distributions import draw
from randlora.bases.factory import BASES, PEFT, Basis, Map, check_basis, depends_on_size, draw_basis
from randlora.bases.kronecker import KroneckerBasis, KroneckerMap

__all__ = [
    "BASES",
    "PEFT",
    "Basis",
    "DenseBasis",
    "DenseMap",
    "KroneckerBasis",
    "KroneckerMap",
    "Map",
    "SparseMap",
    "check_basis",
    "depends_on_size",
    "draw",
    "draw_basis",
]
