"""What tests share: an offline world, small models, composed settings, and real data where a machine has them."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import runpy
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # of the programs that tests start: several with more would wait for each other
}

import pytest
import torch
from torch import nn

from letters import llama
from randlora.config import build
from randlora.config import settings as settings  # what tests compose is what train.py composes
from randlora.models import pretrained
from randlora.models.base import Backbone
from randlora.tasks import Task

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"  # copies of public data and models, where a machine has them
DATA, MODELS = SHARED / "data", SHARED / "models"
os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])

torch.set_num_threads(1)

REACHED: list[str] = []  # addresses outside this machine that something has tried to reach


def no_network(event: str, arguments: tuple) -> None:
    """Refuses connections and look-ups that leave this machine, and notes them: many a library hides the refusal."""
    if event == "socket.connect":
        address = arguments[1]
    elif event == "socket.getaddrinfo":
        address = arguments[:2]
    else:
        return
    if isinstance(address, tuple) and address[0] and not LOCAL.match(str(address[0])):
        REACHED.append(f"{address[0]}:{address[1]}")
        raise OSError(errno.ENETUNREACH, f"tests reach nothing outside this machine, and this is {REACHED[-1]}")


LOCAL = re.compile(rf"localhost|127\.|::1$|0\.0\.0\.0$|{re.escape(socket.gethostname())}$")
sys.addaudithook(no_network)


@pytest.fixture(autouse=True)
def offline() -> Iterator[None]:
    """Fails a test that has tried to leave this machine, whatever it made of the refusal."""
    REACHED.clear()
    yield
    assert REACHED == [], "the test tried to reach these addresses"


def few_layers(name: str, count: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The architecture of this name has so many layers, and its own widths; all are written into the folder."""
    for path in pretrained.ARCHITECTURES.glob("*.json"):
        shape = json.loads(path.read_text()) | ({"num_hidden_layers": count} if path.stem == name else {})
        (folder / path.name).write_text(json.dumps(shape))
    monkeypatch.setattr(pretrained, "ARCHITECTURES", folder)


FORKING = ("bounds", "campaign", "checkpoints", "interruption", "processes", "searches", "submit", "sweeps")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork a process which trains come first.

    A process that has been through the backward pass of a checkpointed part has threads of torch's, and torch lets no
    child of such a process compute gradients.
    """
    forking = {f"test_{name}" for name in FORKING}
    items.sort(key=lambda item: item.path.stem not in forking)


def spare() -> None:
    """Spares later collections of garbage, of which runs and composed settings make thousands, what lives on."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    gc.set_threshold(50_000, 20, 20)
    spare()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or nextitem.path != item.path:
        spare()


class Conv1D(nn.Module):
    """Stands where transformers' Conv1D does, whose import takes seconds: weight (in, out)."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Toy(nn.Module):
    """One site of every shape: square, tall, wide, transposed, fused."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.square = nn.Linear(width, width)
        self.tall = nn.Linear(width, 60)
        self.wide = nn.Linear(60, width, bias=False)
        self.c_attn = Conv1D(3 * width, width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, width) to the same; every linear map takes part."""
        x = self.norm(x + self.wide(torch.tanh(self.tall(self.square(x)))))
        q, k, v = self.c_attn(x).chunk(3, -1)
        x = x + torch.tanh(q) * torch.sigmoid(k) + v
        return x + self.attention(x, x, x, need_weights=False)[0]


class Attention(nn.Module):
    """The four projections of an attention, apart or with three of them fused and all transposed."""

    def __init__(self, width: int, fused: bool):
        super().__init__()
        self.num_heads = 4
        if fused:
            self.c_attn, self.c_proj = Conv1D(3 * width, width), Conv1D(width, width)
        else:
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fused = hasattr(self, "c_attn")
        q, k, v = self.c_attn(x).chunk(3, -1) if fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        mixed = torch.tanh(q) * torch.sigmoid(k) + v
        return self.c_proj(mixed) if fused else self.o_proj(mixed)


class Blocks(nn.Module):
    """Two blocks of attention, for methods that join layers and heads."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": Attention(width, fused)}) for fused in (False, True))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, width) to the same."""
        for layer in self.layers:
            x = self.norm(x + layer["attn"](x))
        return x


BLOCK_TARGETS = [
    *(f"layers.0.attn.{role}_proj" for role in "qkvo"),
    *(f"layers.1.attn.c_attn[{role}]" for role in "qv"),
    "layers.1.attn.c_proj",
]
TOY_TARGETS = ["square", "tall", "wide", "c_attn[q]", "c_attn[v]", "attention.in_proj", "attention.out_proj"]


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def shared(folder: Path) -> Path:
    """A folder of SHARED; skips the test where it is not. One line, so that pytest counts these skips in one."""
    if not folder.is_dir():
        pytest.skip("public data and models beside the repository (../shared) are not on this machine")
    return folder


@pytest.fixture
def shared_data() -> Path:
    return shared(DATA)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a script with its arguments in this process, which has imported torch; returns its exit code."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # which train.py adds the current folder to
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # which train.py sets, and later tests should not find set

    def run(script: str | Path, *arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            return end.code  # type: ignore[return-value]
        return 0

    return run


def task(name: str, *overrides: str) -> Task:
    return build(settings(f"task={name}", *(f"task.{o}" for o in overrides))["task"])


@pytest.fixture(scope="session")
def language_model() -> Backbone:
    return llama()
