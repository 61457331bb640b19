"""The fixed random matrices that updates are made of."""

from randlora.bases.dense import DenseBasis, DenseMap, draw
from randlora.bases.factory import BASES, Basis, Map, basis_of, check_basis, depends_on_size
from randlora.bases.kronecker import KroneckerBasis, KroneckerMap
from randlora.bases.sparse import SparseMap

__all__ = [
    "BASES",
    "Basis",
    "DenseBasis",
    "DenseMap",
    "KroneckerBasis",
    "KroneckerMap",
    "Map",
    "SparseMap",
    "basis_of",
    "check_basis",
    "depends_on_size",
    "draw",
]
