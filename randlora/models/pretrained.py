"""Where a transformers model's weights and architecture come from."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from randlora.adapters.quantization import quantise
from randlora.errors import SettingsError
from randlora.models.base import ARCHITECTURES, Backbone, Model, Source, package_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Pretrained(Model):
    """A transformers model by name.

    Args:
        architecture: a JSON shipped in randlora/models/architectures, from which the meta model is built without the
            hub; None for the config.json beside the weights.
        weights: a folder, a name on the hub, or ``package:NAME/PATH`` inside an installed Python package (a folder, or
            a GGUF file, which is converted once). None for random weights of the architecture.
        revision: of the weights on the hub.
        search: folders in which a relative folder of weights is looked for, besides the current one.
        install: the command that installs the package of `weights`.
        dtype: of the frozen weights; one of DTYPES.
        quantization: for the frozen linear maps inside the blocks int8 or int4, by torchao, or nf4, by bitsandbytes;
            None for `dtype`.
    """

    mapping: ClassVar[str] = "MODEL_MAPPING"  # transformers' name of its map from configurations to classes

    weights: str | None = None
    revision: str | None = None
    search: Sequence[str] = ()
    install: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["int8", "int4", "nf4"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture is not None and not (ARCHITECTURES / f"{self.architecture}.json").is_file():
            known = sorted(path.stem for path in ARCHITECTURES.glob("*.json"))
            raise SettingsError(f"architecture={self.architecture!r}: choose one of {', '.join(known)}")

    def check(self) -> None:
        self._location  # noqa: B018 -- raises when a package or a folder is missing

    @cached_property
    def _location(self) -> str | None:
        """A path that exists, or a hub name, or None."""
        if self.weights is None:
            return None
        if self.weights.startswith("package:"):
            return str(package_file(self.weights.removeprefix("package:"), self.install))
        folders = [Path(self.weights), *(Path(folder) / self.weights for folder in self.search)]
        existing = next((folder for folder in folders if folder.exists()), None)
        if existing is None and self.search:
            looked = ", ".join(map(str, folders))
            raise SettingsError(
                f"the weights of {self.name} are in none of {looked}; set model.weights=FOLDER or $RANDLORA_MODELS"
            )
        return str(existing or self.weights)

    def source(self) -> Source:
        if self.weights is None:
            return Source(f"random weights of the architecture `{self.architecture}`")
        if self.weights.startswith("package:"):
            package, _, inside = self.weights.removeprefix("package:").partition("/")
            return Source(f"`{inside}` in the Python package `{package}` (`{self.install}`)")
        if self.search or Path(self.weights).exists() or not _names_a_repository(self.weights):
            return Source(f"`{self.weights}`", local=f"model.weights={self.weights}")
        at = f" at revision `{self.revision}`" if self.revision else ""
        return Source(f"`{self.weights}`{at}", hub=self.weights)

    def configuration(self) -> PretrainedConfig:
        """The transformers configuration, without the hub where an architecture is named."""
        from transformers import AutoConfig

        if self.architecture is not None:
            return AutoConfig.for_model(**json.loads((ARCHITECTURES / f"{self.architecture}.json").read_text()))
        with _explained(self.name):
            return AutoConfig.from_pretrained(self.folder(), revision=self.revision)

    def meta_model(self) -> Backbone:
        with torch.device("meta"):
            module = self._prepared(self._random())
        return self._backbone(module)

    def load(self) -> Backbone:
        module = self._prepared(self._random() if self._location is None else self._read())
        if self.quantization:
            quantise(module, self.quantization)
        return self._backbone(module)

    def save(self, backbone: Backbone, folder: Path, head: nn.Module | None, names: Sequence[str]) -> bool:
        """As `save_pretrained` does, with the tokenizer where there is one."""
        if self.quantization:
            raise SettingsError(
                f"model.quantization={self.quantization}: a checkpoint in fewer bits is not written; keep the adapter, "
                "whose base is quantised anew whenever it is loaded"
            )
        whole = None if head is None else self._with_head(backbone.module, head, names)
        (whole or backbone.module).save_pretrained(folder)
        if backbone.tokenizer is not None and self._location is not None:
            self.tokenizer().save_pretrained(folder)
        return head is None or whole is not None

    def _with_head(self, module: Any, head: nn.Module, names: Sequence[str]) -> PreTrainedModel | None:
        """The module and a classifier as one of transformers' own models; None where it has none that is the same."""
        return None

    def _backbone(self, module: Any) -> Backbone:
        """What tasks need to know of a module of this kind."""
        raise NotImplementedError

    def _class(self, configuration: PretrainedConfig) -> Any:
        from transformers.models.auto import modeling_auto

        return getattr(modeling_auto, self.mapping)[type(configuration)]

    def _prepared(self, module: Any) -> nn.Module:
        if self.gradient_checkpointing:
            # The name changed in transformers 5.
            enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        return module

    def _random(self) -> nn.Module:
        configuration = self.configuration()
        cls = self._class(configuration)
        return cls(configuration, **_without_pooler(cls)).to(DTYPES[self.dtype])

    def _read(self) -> nn.Module:
        from transformers import AutoConfig

        folder, revision, dtype = self.folder(), self.revision, DTYPES[self.dtype]
        with _explained(self.name):
            config = AutoConfig.from_pretrained(folder, revision=revision)  # of the weights, not of `architecture`
            cls = self._class(config)
            return cls.from_pretrained(folder, config=config, revision=revision, dtype=dtype, **_without_pooler(cls))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the weights. Raises SettingsError where there are none."""
        from transformers import AutoTokenizer

        if self._location is None:
            raise SettingsError(f"model {self.name} has random weights and so no tokenizer: give model.weights")
        with _explained(self.name):
            return AutoTokenizer.from_pretrained(self.folder(), revision=self.revision)

    def folder(self) -> str:
        """What from_pretrained takes: the folder or hub name; a GGUF file is converted to a folder once."""
        location = self._location
        if location is None:
            raise SettingsError(f"model {self.name}: give weights, or the name of a shipped architecture")
        if not location.endswith(".gguf"):
            return location
        return str(_converted(Path(location), self.install))


def named_outputs(config: PretrainedConfig, names: Sequence[str], outputs: int) -> PretrainedConfig:
    """A copy of a configuration for a classifier of so many outputs."""
    labels = dict(enumerate(names or [f"LABEL_{i}" for i in range(outputs)]))
    return type(config)(**config.to_dict() | {"id2label": labels, "label2id": {n: i for i, n in labels.items()}})


def _names_a_repository(text: str) -> bool:
    """Whether the hub could have something of this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _without_pooler(cls: type) -> dict[str, bool]:
    """Encoders come without BERT's pooler, which no task here uses and which would count as a linear map."""
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(cls.__init__).parameters else {}  # type: ignore[misc]


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Makes transformers' errors about files and hub one SettingsError on the model `name`."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise SettingsError(
            f"cannot load model {name}: {first} (offline? set model.weights to a folder with the files)"
        ) from error


def _converted(gguf: Path, install: str) -> Path:
    """The GGUF file as a folder of safetensors and tokenizer, kept in the cache: converting takes half a minute."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "randlora"
    folder = cache / f"{gguf.stem}-{gguf.stat().st_size}"
    if (folder / "config.json").is_file():
        return folder
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise SettingsError(f"reading {gguf.name} needs the package gguf: {install}") from error
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    # The weights are unpacked, but transformers calls the model quantised and would not save it.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(draft)
    save_model(model, str(draft / "model.safetensors"), metadata={"format": "pt"})
    tokenizer.save_pretrained(draft)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # another process was quicker
        draft.rename(folder)
    return folder
