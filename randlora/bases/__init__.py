"""The fixed random matrices that updates are made of."""

from randlora.bases.dense import DenseBasis, DenseMap, draw
from randlora.bases.kinds import KINDS, Basis, Map, basis_of, check_kind, depends_on_size
from randlora.bases.kronecker import KroneckerBasis, KroneckerMap
from randlora.bases.sparse import SparseMap

__all__ = [
    "KINDS",
    "Basis",
    "DenseBasis",
    "DenseMap",
    "KroneckerBasis",
    "KroneckerMap",
    "Map",
    "SparseMap",
    "basis_of",
    "check_kind",
    "depends_on_size",
    "draw",
]
