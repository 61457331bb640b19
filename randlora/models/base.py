"""What every model offers to the tasks."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from randlora.adapters.targets import ALL_LINEAR, match
from randlora.bounds import Bounded, FolderName
from randlora.errors import SettingsError

ARCHITECTURES = Path(__file__).parent / "architectures"


@dataclass(frozen=True)
class Pixels:
    """What an image tower wants: a square of `size` pixels, normalised by `mean` and `std` (RGB, of 0 to 1)."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Source(NamedTuple):
    """Where a model's weights come from, in `words` for others, and by name where it is the hub or this machine alone.

    `hub` is the name there, as OWNER/NAME; `local` the setting that names a file or folder of this machine.
    """

    words: str
    hub: str | None = None
    local: str | None = None


@dataclass
class Backbone:
    """A loaded model, ready to be adapted and given a head.

    Args:
        module: what is adapted.
        kind: clip, vision, text or causal_lm; it decides the head.
        width: the length of a feature vector.
        pixels: what the image tower wants, where there is one.
        tokenizer: makes the text tower's tokenizer, where there is one; a dry run never asks.
        features: from (module, inputs) to features (B, width), for tasks that put a head on them.
        head_dropout: before a text classifier's linear maps, as a probability.
        head_hidden: whether a hidden layer with tanh comes before the classifier, as RoBERTa's.
    """

    module: nn.Module
    kind: str
    width: int
    pixels: Pixels | None = None
    tokenizer: Callable[[], Any] | None = None
    features: Callable[..., Tensor] | None = None
    head_dropout: float = 0.0
    head_hidden: bool = False


@dataclass(frozen=True)
class Model(Bounded):
    """Names a model and its target sets; subclasses say how it is made.

    Args:
        name: as in configs and records.
        architecture: what the library that makes the model calls it.
        targets: named sets of patterns of module names, of the linear maps that are adapted.
        gradient_checkpointing: blocks are computed again in backward instead of kept: less memory, more time.
    """

    kind: ClassVar[str]
    section: ClassVar[str] = "model"

    name: FolderName
    architecture: str | None = None
    targets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    gradient_checkpointing: bool = False

    def load(self) -> Backbone:
        """The model with its real weights. Raises SettingsError when they cannot be had."""
        raise NotImplementedError

    def meta_model(self) -> Backbone:
        """The same modules on the meta device: shapes without values, weights read or a network."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises SettingsError for what can be known wrong at once, such as a missing folder."""

    def source(self) -> Source:
        """Where `load` has its weights from, by the settings alone."""
        return Source(f"the weights that randlora's `model={self.name}` loads")

    def save(self, backbone: Backbone, folder: Path, head: nn.Module | None, names: Sequence[str]) -> bool:
        """Writes a checkpoint that the library which made the model loads without this one.

        Args:
            backbone: what `load` gave, its module plain again.
            folder: where the files go; it is there, and empty.
            head: a task's, on the features; it is put into the checkpoint where the library has the same classifier.
            names: the classes', in the order of the head's outputs; none where these are no classes.

        Returns:
            Whether the head is in the checkpoint, or there is none.
        """
        raise SettingsError(f"model {self.name} cannot be written as a checkpoint of another library: keep the adapter")

    def patterns(self, targets: str | Sequence[str]) -> list[str]:
        """The patterns of a named target set or of ``all-linear``, or the list of patterns given.

        Raises:
            SettingsError: there is no such set, or a pattern matches none of the module names where these are known.
        """
        if isinstance(targets, Sequence) and not isinstance(targets, str):
            patterns = [str(pattern) for pattern in targets]
        elif targets in self.targets:
            patterns = list(self.targets[targets])
        elif targets == ALL_LINEAR:
            patterns = [targets]
        else:
            raise SettingsError(
                f"targets={targets}: model {self.name} has the sets {', '.join(self.targets)}; "
                f"or give {ALL_LINEAR}, or a list of patterns"
            )
        module_names = self.module_names()
        if module_names is not None:
            match(module_names, patterns)
        return patterns

    def module_names(self) -> list[str] | None:
        """The names of the model's linear maps, if they are known without building it.

        Building even an empty model means importing transformers or open_clip, which takes many seconds; with the
        names at hand, a pattern that matches nothing is refused at once. Written by scripts/module_names.py.
        """
        path = ARCHITECTURES / "module_names" / f"{self.architecture}.json"
        return expand(json.loads(path.read_text())) if path.is_file() else None


def expand(module_names: Sequence[tuple[str, int]]) -> list[str]:
    """Names from [template, count] pairs: ["layers.*.fc", 3] is layers.0.fc, layers.1.fc, layers.2.fc."""
    return [template.replace("*", str(i), 1) for template, count in module_names for i in range(count or 1)]


def package_file(location: str, install: str) -> Path:
    """The path of a file in an installed Python package.

    Args:
        location: ``package/path/in/it``.
        install: the command that installs the package.

    Raises:
        SettingsError: the package or the file is not there.
    """
    package, _, inside = location.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SettingsError(f"the weights are in the Python package {package}, which is not installed: {install}")
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.exists():
        raise SettingsError(f"the Python package {package} has no {inside}: {install}")
    return path


def require_a_patch(image_size: int, patch: int, architecture: str | None) -> None:
    """Raises SettingsError where an image, `image_size` pixels wide, is smaller than a patch."""
    if image_size < patch:
        raise SettingsError(f"model.image_size={image_size}: a patch of {architecture} is {patch} pixels wide")
