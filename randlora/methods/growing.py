"""The update of one site that gains ranks in training, and the gradient of ΔW that says where they matter."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.adapters.interface import Frozen, Site
from randlora.bases import draw
from randlora.methods.common import LowRankUpdate, low_rank_linear
from randlora.methods.weight_gradient import AddWeightGradient

ADVANCE = 1e-5  # λ of ranks that are trained in advance


class GrowingUpdate(LowRankUpdate):
    """ΔW = (alpha / ρ) · Σ_i λ_i b_i a_i. Each rank has tensors of its own, named by the step of their birth.

    `a` and `b` hold the ranks and after them those that are trained in advance; `lambda_` holds those of the ranks,
    which are born when a rank is. Keys are ``birth_index``.
    """

    gradient: Tensor | None  # of the loss by ΔW in this step so far, (out, in), while the site grows
    importance: Tensor  # the running means I and U of the score

    def __init__(self, site: Site, rank: int, alpha: float, dropout: float, seed: int, device: torch.device):
        super().__init__()
        self.site, self.start, self.seed, self.alpha, self.dropout = site, rank, seed, alpha, dropout
        self.a, self.b, self.lambda_ = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.A: nn.Parameter | None = None
        self.B: nn.Parameter | None = None
        self.register_buffer("importance", torch.zeros(2, device=device))
        self.register_buffer("gradient", torch.zeros(site.shape, device=device), persistent=False)
        self._begin()

    def _begin(self) -> None:
        self.advance(self.start, 0)
        self.grow(self.start, 0, 0.0)

    @staticmethod
    def birth(name: str) -> int:
        """The first step that changes a tensor, from its name."""
        return int(name.rpartition(".")[2].partition("_")[0])

    @property
    def rank(self) -> int:
        """ρ, without the ranks in advance."""
        return len(self.lambda_)

    @property
    def score(self) -> float:
        """I · U."""
        return float(self.importance.prod())

    @property
    def scale(self) -> float:  # type: ignore[override]
        """alpha / ρ."""
        return self.alpha / max(self.A.shape[0] if self.A is not None else self.rank, 1)

    def advance(self, count: int, birth: int) -> None:
        """Begins with `count` ranks in advance, trained from the step `birth` on."""
        out_features, in_features = self.site.shape
        for index in range(count):
            key = f"{birth}_{index}"
            self.a[key] = nn.Parameter(self._start("a", key, in_features)[None])
            self.b[key] = nn.Parameter(self._start("b", key, out_features)[:, None])

    def _start(self, factor: str, key: str, size: int) -> Tensor:
        device = self.importance.device
        if device.type == "meta":
            return torch.empty(size, device=device)
        drawn = draw(1, size, f"increlora.{factor}", key, self.site.name, self.seed, distribution="normal")
        return 0.02 * drawn[0].to(device, self.importance.dtype)

    def grow(self, count: int, birth: int, start: float = ADVANCE) -> None:
        """Takes over the first `count` ranks in advance; their λ begin at `start` and are trained from `birth` on."""
        for index in range(count):
            value = torch.full((1, 1), start, device=self.importance.device, dtype=self.importance.dtype)
            self.lambda_[f"{birth}_{index}"] = nn.Parameter(value)

    def stop_growing(self) -> None:
        """Drops what is trained in advance, and the gradient."""
        for key in list(self.a)[self.rank :]:
            del self.a[key], self.b[key]
        self.gradient = None

    def resume(self, names: Collection[str]) -> bool:
        if {name for name, _ in self.named_parameters()} == set(names):
            return False
        rows, columns = self.site.shape
        factors = {"a": (self.a, (1, columns)), "b": (self.b, (rows, 1)), "lambda_": (self.lambda_, (1, 1))}
        for tensors, _ in factors.values():
            tensors.clear()
        if not names:
            self._begin()
        for factor, (tensors, shape) in factors.items():
            keys = [name.partition(".")[2] for name in names if name.startswith(f"{factor}.")]
            for key in sorted(keys, key=lambda key: [int(part) for part in key.split("_")]):
                tensors[key] = nn.Parameter(self.importance.new_empty(shape))
        return True

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """A (rows, in), B (out, rows) and λ (rows, 1), with the ranks in advance."""
        A, B, ranks = torch.cat([*self.a.values()]), torch.cat([*self.b.values()], 1), [*self.lambda_.values()]
        return A, B, torch.cat([*ranks, A.new_full((len(A) - len(ranks), 1), ADVANCE)])

    def low_rank(self) -> tuple[Tensor, Tensor]:
        if self.A is not None and self.B is not None:
            return self.A, self.B
        A, B, values = self.factors()
        return A * values, B

    def forward(self, x: Tensor, base: Frozen) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training)
        y = low_rank_linear(x, base, dropped, *self.low_rank(), self.scale)
        if self.gradient is None or not (self.training and torch.is_grad_enabled()):
            return y
        return AddWeightGradient.apply(y, dropped, self.gradient)

    def orthogonality(self) -> list[Tensor]:
        """‖A Aᵀ - 1‖ and ‖Bᵀ B - 1‖."""
        A, B, _ = self.factors()
        return [torch.linalg.matrix_norm(M @ M.T - torch.eye(len(M), device=M.device, dtype=M.dtype)) for M in (A, B.T)]

    @torch.no_grad()
    def take_score(self, memory: float) -> None:
        """Takes the step's score into the running means, which weigh `memory`, and begins the gradient anew."""
        assert self.gradient is not None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.gradient)
            self.gradient /= torch.distributed.get_world_size()
        score = (self.delta(self.gradient) * self.gradient).abs().mean()
        mean = self.importance[0].lerp(score, 1 - memory)
        self.importance.copy_(torch.stack([mean, self.importance[1].lerp((score - mean).abs(), 1 - memory)]))
        self.gradient.zero_()

    @torch.no_grad()
    def fold(self) -> int:
        """Leaves LoRA's two factors of the ranks alone, with λ in A; their number."""
        self.stop_growing()
        rank = self.rank
        self.A, self.B = (nn.Parameter(factor) for factor in self.low_rank())
        for tensors in (self.a, self.b, self.lambda_):
            tensors.clear()
        del self.importance
        return rank
