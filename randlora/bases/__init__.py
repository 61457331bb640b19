"""The fixed random matrices that updates are made of."""

from randlora.bases.dense import DenseBasis, DenseMap, SparseMap
from randlora.bases.distributions import draw
from randlora.bases.factory import PEFT, Basis, BasisName, Map, Sparsity, check_sparsity, depends_on_size, draw_basis
from randlora.bases.kronecker import KroneckerBasis, KroneckerMap

__all__ = [
    "PEFT",
    "Basis",
    "BasisName",
    "DenseBasis",
    "DenseMap",
    "KroneckerBasis",
    "KroneckerMap",
    "Map",
    "SparseMap",
    "Sparsity",
    "check_sparsity",
    "depends_on_size",
    "draw",
    "draw_basis",
]
