"""Bases: the same bits everywhere, slices that do not depend on the whole, the moments they claim."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm

from randlora.bases import DenseBasis, DenseMap, KroneckerBasis, SparseMap, draw
from randlora.bases.distributions import _log, _normal_quantile
from randlora.bases.factory import check_sparsity, draw_basis
from randlora.bases.kronecker import factor_pair
from randlora.bases.orthogonal import orthogonal
from randlora.bases.peft import randlora_bases, vera_bases
from randlora.errors import SettingsError
from randlora.rng import permutation, random_uint32

# SHA-256 of draw(33, 65, "golden", 7), taken when layout 1 was written: a change here is a change of every adapter.
GOLDEN = {
    "uniform": "d05aed1e25f54c11f3900b520f25966de849201fb21a353fe96a6103dd0ffbf4",
    "normal": "6a300f20b13776bdd739c9631a2e52c9bc427febae6b3948f799a91063d6bc04",
    "ternary": "c6e7399ce589ab8b22b466529a6728223884300d48fd17eda41c642f238b13a3",
}
GOLDEN_KRONECKER = "ace9ac0641f265564537e7b935de8cacf09135acf107cd2d0c2c315752095dc4"


def sha256(distribution: str) -> str:
    basis = DenseBasis.drawn("golden", 33, 65, seed=7, distribution=distribution)
    return basis.sha256()


@pytest.mark.parametrize("distribution", GOLDEN)
def test_bits_are_the_recorded_ones(distribution: str) -> None:
    assert sha256(distribution) == GOLDEN[distribution]


def test_bits_are_the_same_in_another_process_with_other_threads_and_default_dtype() -> None:
    code = (
        "import torch; torch.set_num_threads(2); torch.set_default_dtype(torch.float64); torch.manual_seed(5);"
        "from randlora.bases import DenseBasis;"
        "print(DenseBasis.drawn('golden', 33, 65, seed=7, distribution='normal').sha256())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == GOLDEN["normal"]


@pytest.mark.parametrize("distribution", GOLDEN)
def test_a_block_does_not_depend_on_the_whole(distribution: str) -> None:
    small = draw(5, 7, "b", 0, distribution=distribution)
    large = draw(50, 70, "b", 0, distribution=distribution)
    assert torch.equal(small, large[:5, :7])


def test_names_seeds_and_rows_give_different_numbers() -> None:
    base = draw(4, 64, "b", 0)
    assert not torch.equal(base, draw(4, 64, "c", 0))
    assert not torch.equal(base, draw(4, 64, "b", 1))
    assert not torch.equal(base[0], base[1])


def test_distributions_against_scipy() -> None:
    u = draw(64, 4096, "moments", 0).flatten().numpy()
    z = draw(64, 4096, "moments", 0, distribution="normal").flatten().numpy()
    assert kstest(u, "uniform", (-np.sqrt(3), 2 * np.sqrt(3))).pvalue > 1e-3
    assert kstest(z, "norm").pvalue > 1e-3


@pytest.mark.parametrize("sparsity", [2.0, 3.0, 27.7])
def test_ternary_has_its_zeros_and_unit_variance(sparsity: float) -> None:
    x = draw(64, 4096, "moments", 0, distribution="ternary", sparsity=sparsity)
    assert sorted(x.unique().abs().round(decimals=4).unique().tolist())[-1] == pytest.approx(
        (sparsity / 2) ** 0.5, abs=1e-4
    )
    assert (x == 0).float().mean().item() == pytest.approx(1 - 2 / sparsity, abs=0.01)
    assert x.var().item() == pytest.approx(1, abs=0.03)


def test_own_logarithm_and_quantile_against_numpy_and_scipy() -> None:
    p = np.concatenate([np.linspace(1e-4, 1 - 1e-4, 10001), 10.0 ** -np.arange(1.0, 20)])
    assert np.abs(_log(p) - np.log(p)).max() < 1e-14
    assert np.abs(_normal_quantile(p) - norm.ppf(p)).max() < 1e-6


def test_half_precision_models_keep_float32_bases() -> None:
    basis = DenseBasis.drawn("b", 8, 8, seed=0)
    before = basis.sha256()
    basis.half()
    assert basis.sha256() == before
    assert basis.block(4, 4, torch.bfloat16).dtype == torch.bfloat16


def test_nothing_is_drawn_on_the_meta_device() -> None:
    assert DenseBasis.drawn("b", 100_000, 100_000, seed=0, device="meta").matrix.is_meta


def test_streams_leave_the_global_generators_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    draw(4, 4, "b", 0)
    permutation(10, "p")
    random_uint32(10, "w")
    assert (torch.rand(1), np.random.rand()) == before


def test_permutation_is_one() -> None:
    assert sorted(permutation(1000, "p", 3)) == list(range(1000))


def test_wrong_settings_are_refused() -> None:
    from randlora.methods import RandLoRA

    for bad in (
        {"basis": "cauchy"},
        {"sparsity": 3.0},
        {"basis": "ternary", "sparsity": 1.0},
        {"basis": "binary", "sparsity": 3.0},
        {"delta_dtype": "float16"},
    ):
        with pytest.raises(SettingsError):
            RandLoRA(rank=2, **bad)


def test_ternary_bases_are_stored_as_bytes() -> None:
    basis = DenseBasis.drawn("golden", 33, 65, seed=7, distribution="ternary")
    assert basis.matrix.dtype == torch.int8
    assert torch.equal(basis.block(33, 65), draw(33, 65, "golden", 7, distribution="ternary"))


@pytest.mark.parametrize("name", ["uniform", "ternary", "sparse products", "kronecker"])
@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (48, 24), (61, 24), (23, 23), (24, 61)])
@pytest.mark.parametrize("less", [0, 3])
def test_maps_multiply_as_their_matrix_does(name: str, rows: int, columns: int, less: int) -> None:
    """Oracle: the matrix itself, in float64; `less` cuts the smaller side, as few bases do."""
    if name == "kronecker":
        basis = KroneckerBasis("m", rows, columns, seed=0)
    elif name == "sparse products":
        basis = DenseBasis.drawn("m", rows, columns, seed=0, distribution="ternary", sparsity=20.0)
        assert isinstance(basis(rows, columns), SparseMap)
    else:
        basis = DenseBasis.drawn("m", rows, columns, seed=0, distribution=name)
    rows, columns = (rows, columns - less) if rows >= columns else (rows - less, columns)
    B = basis(rows, columns)
    matrix = B.matrix(torch.float64)
    assert matrix.shape == (rows, columns) == (B.rows, B.columns)
    h, x = torch.randn(5, columns, dtype=torch.float64), torch.randn(5, rows, dtype=torch.float64)
    onto = torch.randn(5, rows, dtype=torch.float64)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(B.up(h), h @ matrix.T, **close)
    torch.testing.assert_close(B.up(h, onto.clone()), onto + h @ matrix.T, **close)
    assert B.up(h, onto_in_place := onto.clone()).data_ptr() == onto_in_place.data_ptr()
    torch.testing.assert_close(B.up(h.float(), onto.clone()), onto + h @ matrix.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(B.down(x), x @ matrix, **close)
    torch.testing.assert_close(B.times(h.T), matrix @ h.T, **close)
    torch.testing.assert_close(B.transposed_times(x.T), matrix.T @ x.T, **close)


@pytest.mark.parametrize("size", [24, 768, 97, 1])
@pytest.mark.parametrize("times", [1.0, 4.0, 2.5])
def test_kronecker_bases_are_orthogonal(size: int, times: float) -> None:
    """The module's claims: BᵀB = N·k·I for D = k·N, a condition number of at most √2 else, mean square 1."""
    B = KroneckerBasis("k", round(times * size), size, seed=1)(round(times * size), size).matrix(torch.float64)
    values = torch.linalg.svdvals(B)
    whole = B.shape[0] % size == 0
    assert values[0] / values[-1] <= (1 + 1e-6 if whole else 2**0.5 + 1e-6)
    if whole:
        torch.testing.assert_close(values[0].item(), (size * B.shape[0] / size) ** 0.5, rtol=1e-6, atol=0)
        assert B.square().mean().item() == pytest.approx(1, rel=1e-6)


def test_orthogonal_matrices_are_those_of_lapack() -> None:
    """Oracle: NumPy's QR of the same normal matrix, with R's diagonal made positive."""
    Q, R = np.linalg.qr(draw(50, 50, "q", 3, distribution="normal").double().numpy())
    np.testing.assert_allclose(orthogonal(50, "q", 3).numpy(), Q * np.sign(np.diag(R)), atol=1e-12)


def test_kronecker_bits_are_the_recorded_ones() -> None:
    assert KroneckerBasis("golden", 96, 48, seed=7).sha256() == GOLDEN_KRONECKER


def test_a_kronecker_block_does_not_depend_on_the_whole() -> None:
    small, large = KroneckerBasis("k", 40, 24, seed=0)(40, 20), KroneckerBasis("k", 240, 24, seed=0)(40, 20)
    assert torch.equal(small.matrix(), large.matrix())


def test_factor_pairs() -> None:
    assert [factor_pair(n) for n in (768, 896, 1024, 97, 1)] == [(24, 32), (28, 32), (32, 32), (1, 97), (1, 1)]


def test_a_products_multiplications_are_counted() -> None:
    """Dense: all entries; sparse: those that are not zero; Kronecker, 24 = 4·6 and 48 = 8·6: 4·6² and 8·4·6."""
    assert DenseBasis.drawn("m", 30, 20, seed=0)(7, 5).multiplications() == 35
    sparse = DenseBasis.drawn("m", 30, 20, seed=0, distribution="ternary", sparsity=20.0)(30, 20)
    assert sparse.multiplications() == int((sparse.matrix() != 0).sum()) > 0
    for rows, columns in ((48, 24), (24, 48)):
        assert KroneckerBasis("m", rows, columns, seed=0)(rows, columns).multiplications() == 336


def test_sparse_products_say_nothing_of_torchs_beta() -> None:
    basis = DenseBasis.drawn("m", 30, 20, seed=0, distribution="ternary", sparsity=20.0)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            basis(30, 20).times(torch.ones(20, 1))
        with pytest.warns(UserWarning, match="Sparse CSR tensor support is in beta"):
            torch.ones(2, 2).to_sparse_csr()
    finally:
        torch.set_warn_always(False)


def test_a_cast_of_a_model_without_values_leaves_its_bases_without_values() -> None:
    for basis in (DenseBasis.drawn("b", 8, 4, seed=0, device="meta"), KroneckerBasis("b", 8, 4, seed=0, device="meta")):
        assert all(buffer.is_meta and buffer.dtype == torch.float32 for buffer in basis.bfloat16().buffers())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_pefts_bases_are_named_as_adapter_files_name_them(device: str) -> None:
    """A file's checksums go by these names: another one, and no file of before can be read."""
    for bases in (randlora_bases, vera_bases):
        for pair in bases({"a": (6, 4), "b": (3, 8)}, 2, 0, torch.device(device)).values():
            assert [basis.name for basis in pair] == ["peft.A", "peft.B"]


@pytest.mark.parametrize(("size", "root"), [(None, 8), (100, 10), (1, 2)])
def test_very_sparse_matrices_go_by_the_root_of_the_smaller_side(size: int | None, root: int) -> None:
    """The RandLoRA paper's: 1 and -1 with a probability of 1/√d each, of 64 × 2,000 an eighth each."""
    basis = draw_basis("very_sparse", "b", 64, 2000, size=size, seed=0, device=torch.device("cpu"))
    assert (basis(64, 2000).matrix(torch.float32) != 0).float().mean().item() == pytest.approx(2 / root, rel=0.05)


MAPS = {
    "dense": lambda: DenseBasis.drawn("m", 30, 20, seed=0),
    "sparse": lambda: DenseBasis.drawn("m", 30, 20, seed=0, distribution="ternary", sparsity=20.0),
    "kronecker": lambda: KroneckerBasis("m", 30, 20, seed=0),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_multiply_in_half_precision(name: str) -> None:
    """Oracle: the matrix in bfloat16 and products in float64, to what bfloat16 can say; signs are exact in it."""
    B = MAPS[name]()(30, 20)
    matrix = B.matrix(torch.bfloat16)
    assert matrix.dtype == torch.bfloat16
    h, x = torch.randn(5, 20).bfloat16(), torch.randn(5, 30).bfloat16()
    for found, expected in (
        (B.up(h), h.double() @ matrix.T.double()), (B.down(x), x.double() @ matrix.double()),
        (B.times(h.T), matrix.double() @ h.T.double()), (B.transposed_times(x.T), matrix.T.double() @ x.T.double()),
    ):  # fmt: skip
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.1)
    onto = torch.ones(5, 30)
    torch.testing.assert_close(B.up(h, onto.clone()), onto + B.up(h).float())


def test_a_cast_or_compressed_matrix_is_made_once_and_anew_after_a_move() -> None:
    basis = MAPS["dense"]()
    half = basis.block(4, 5, torch.bfloat16)
    assert basis.block(6, 7, torch.bfloat16).data_ptr() == half.data_ptr()
    torch.testing.assert_close(half, basis.matrix[:4, :5].bfloat16(), rtol=0, atol=0)
    assert basis.block(4, 5, torch.float64).dtype == torch.float64
    assert basis.block(4, 5).data_ptr() == basis.matrix.data_ptr()
    sparse = MAPS["sparse"]()
    rows = {
        (dtype, transposed): sparse.compressed(6, 4, dtype, transposed)
        for dtype in (torch.float32, torch.float64) for transposed in (True, False)
    }  # fmt: skip
    for (dtype, transposed), compressed in rows.items():
        assert sparse.compressed(6, 4, dtype, transposed) is compressed
        expected = sparse.block(6, 4, dtype)
        assert torch.equal(compressed.to_dense(), expected.T if transposed else expected)
    assert sparse.compressed(5, 4, torch.float32, False).shape == (5, 4)
    sparse.to("cpu")
    assert sparse.compressed(6, 4, torch.float32, True) is not rows[torch.float32, True]


def test_few_signs_are_multiplied_sparsely_on_a_cpu() -> None:
    """Below a density of 0.15, 2 / s; what torch compiles, and other devices, take the dense product."""
    ternary = lambda s, **about: DenseBasis.drawn("m", 8, 6, seed=0, distribution="ternary", sparsity=s, **about)  # noqa: E731
    assert isinstance(ternary(14.0)(8, 6), SparseMap)
    assert isinstance(ternary(13.0)(8, 6), DenseMap)
    assert isinstance(ternary(14.0, device="meta")(8, 6), DenseMap)
    assert isinstance(MAPS["dense"]()(8, 6), DenseMap)
    for dtype, kept in ((torch.bfloat16, 0), (torch.float32, 2), (torch.float64, 2)):
        basis = ternary(14.0)
        basis(8, 6).times(torch.ones(6, 1, dtype=dtype))
        basis(8, 6).transposed_times(torch.ones(8, 1, dtype=dtype))
        assert len(basis._compressed) == kept


@pytest.mark.parametrize(
    ("basis", "sparsity", "s"),
    [
        ("uniform", None, None), ("normal", None, None), ("ternary", None, 3), ("sparse", None, 3), ("binary", None, 2),
        ("ternary", 7.0, 7), ("sparse", 7.0, 7), ("very_sparse", None, 6),
    ],
)  # fmt: skip
def test_a_basis_of_a_name_on_every_device(basis: str, sparsity: float | None, s: float | None) -> None:
    """Entries ±√(s/2) in a share 2/s; on the meta device the same shapes and dtypes without values."""
    about = {"rows": 36, "columns": 50, "sparsity": sparsity, "seed": 0}
    drawn, planned = (draw_basis(basis, "b", device=torch.device(d), **about) for d in ("cpu", "meta"))  # type: ignore[arg-type]
    assert isinstance(drawn, DenseBasis)
    assert drawn.reproducible
    assert (drawn.unit, drawn.density) == (pytest.approx((s / 2) ** 0.5), pytest.approx(2 / s)) if s else (1, 1)
    if s:
        assert drawn(36, 50).matrix().abs().unique().tolist() == pytest.approx([0] * (s > 2) + [(s / 2) ** 0.5])
    kept = [(buffer.shape, buffer.dtype) for buffer in planned.buffers()]
    assert kept == [(buffer.shape, buffer.dtype) for buffer in drawn.buffers()]
    assert kept == [((36, 50), torch.int8 if s else torch.float32)]
    assert all(buffer.is_meta for buffer in planned.buffers())
    check_sparsity(basis, None)
    if basis in ("ternary", "sparse"):
        check_sparsity(basis, 2.0)
    else:
        with pytest.raises(SettingsError, match="goes with basis=ternary or sparse"):
            check_sparsity(basis, 2.0)


@pytest.mark.parametrize(("rows", "columns"), [(48, 24), (24, 48), (61, 24), (23, 23)])
def test_a_kronecker_basis_is_its_product_and_has_its_shapes_without_values(rows: int, columns: int) -> None:
    drawn, planned = (KroneckerBasis("k", rows, columns, seed=0, device=device) for device in ("cpu", "meta"))
    assert [b.shape for b in planned.buffers()] == [b.shape for b in drawn.buffers()]
    assert planned(rows, columns).matrix().shape == (rows, columns)
    assert drawn.state_dict() == DenseBasis.drawn("b", 3, 2, seed=0).state_dict() == {}  # no file holds them
    whole = torch.kron(drawn.left, drawn.right)[: max(rows, columns)]  # the module's formula
    assert torch.equal(drawn(rows, columns).matrix(), whole if rows >= columns else whole.T)


def test_a_lower_block_costs_less() -> None:
    """24 of 48 rows, 24 = 4·6: 4·6² and 4·4·6 multiplications."""
    assert KroneckerBasis("m", 48, 24, seed=0)(24, 24).multiplications() == 240
    assert KroneckerBasis("m", 48, 24, seed=0)(25, 24).multiplications() == 144 + 5 * 24


@pytest.mark.parametrize("bases", [randlora_bases, vera_bases])
def test_pefts_bases_without_values_have_their_shapes(bases) -> None:  # type: ignore[no-untyped-def]
    shapes = {"a": (6, 4), "b": (3, 9), "c": (9, 5)}
    drawn, planned = (bases(shapes, 2, 0, torch.device(device)) for device in ("cpu", "meta"))
    for site in shapes:
        for one, other in zip(drawn[site], planned[site], strict=True):
            assert (one.matrix.shape, one.matrix.dtype) == (other.matrix.shape, other.matrix.dtype)
            assert other.matrix.is_meta
