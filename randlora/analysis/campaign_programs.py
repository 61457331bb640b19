"""What the storm of `randlora.analysis.campaign` strikes: our command, and transformers' Trainer with PEFT's LoRA.

Both train on a few of scikit-learn's digits, in 8 × 8 pixels, a vision transformer of one block with a head.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

import randlora
from randlora.analysis.campaign import LOADED, LOADED_DIFFERENT, STEPS, Settings
from randlora.analysis.faults import attempt
from randlora.config import CONFIGS, settings
from randlora.errors import exit_code
from randlora.experiment import Experiment
from randlora.records.lock import OWNER
from randlora.records.record import state
from randlora.records.result import Result

_COMMON = (
    "model=vit_b16", "model.name=vit_tiny", "model.architecture=null", "model.image_size=8", "task.test_size=6",
    "task.validation_size=10", "shots=1", f"trainer.max_steps={STEPS}", "trainer.batch_size=4", "trainer.log_every=1",
    "trainer.device=cpu", "trainer.learning_rate=0.01",
)  # fmt: skip
_IMPORTED = (
    "randlora.cli", "randlora.run", "accelerate", "sklearn.datasets", "torchvision.transforms.v2",
    "transformers.models.vit.modeling_vit",
)  # fmt: skip
_NOT_OUTPUTS = ("train_seconds", "seconds_per_step", "peak_memory_bytes", "config", "versions", "commit")


def prepare(root: Path) -> Path:
    """Writes the vision transformer's random weights into a folder of `root`, and returns it.

    Imports what runs import, so that their processes, which are forked, need not.
    """
    os.environ["GIT_DIR"] = os.devnull  # which commit it is takes longer than a training of these
    for module in _IMPORTED:
        importlib.import_module(module)
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("vit")  # it is kept
    folder = root / "model"
    folder.mkdir(parents=True, exist_ok=True)
    ending = attempt(partial(_make_model, folder), folder, root / "model.log")
    if ending.code:
        raise RuntimeError(ending.said)
    return folder


def _make_model(folder: Path) -> int:
    from transformers import ViTConfig, ViTModel

    configuration = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    ViTModel(configuration, add_pooling_layer=False).save_pretrained(folder)
    return 0


class Ours:
    """``train.py`` with every method.

    Args:
        main: The command line's, given its arguments; it returns the exit code.
        model: The folder that `make_model` wrote.
    """

    name = "randlora"
    methods = sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml"))

    def __init__(self, main: Callable[[Sequence[str]], int], model: Path):
        self._main, self._model = main, model

    def settings(self, rng: Random, number: int) -> Settings:
        return {
            "method": self.methods[number % len(self.methods)],
            "accumulated": rng.random() < 0.5,
            "evaluated": rng.random() < 0.5,
            "random": rng.random() < 0.5,  # what the noise of a step decides: dropout, and where images are cropped
            "precision": rng.choice(("fp32", "bf16")),
            "workers": rng.choice((0, 0, 2)),
            "save_every": rng.choice((2, 3, 4, None)),
        }

    def arguments(self, drawn: Settings, root: Path) -> list[str]:
        """Those of the command line."""
        method = drawn["method"]
        given = [
            *_COMMON, f"method={method}", f"model.weights={self._model}", f"run_root={root}",
            f"trainer.precision={drawn['precision']}", f"trainer.workers={drawn['workers']}",
            f"trainer.save_every={'null' if drawn['save_every'] is None else drawn['save_every']}",
        ]  # fmt: skip
        given += {"lorta": ["targets=attention"], "mora": ["method.rank=4"]}.get(method, [])
        given += ["trainer.micro_batch_size=2"] if drawn["accumulated"] else []
        given += ["trainer.evaluate_every=2", "trainer.select=best"] if drawn["evaluated"] else []
        if drawn["random"]:
            given.append("task.augmentation=crop")
            if "dropout:" in (CONFIGS / "method" / f"{method}.yaml").read_text():
                given.append("method.dropout=0.1")
        return given

    def main(self, drawn: Settings, root: Path) -> int:
        return self._main(self.arguments(drawn, root))

    def load(self, drawn: Settings, folder: Path, undisturbed: Path) -> int:
        def main() -> int:
            backbone = Experiment.from_config(settings(*self.arguments(drawn, folder))).model.load()
            randlora.load_adapter(backbone.module, folder / "adapter", modules={})
            return LOADED_DIFFERENT  # a sealed file differs

        return exit_code(main)

    def folder(self, root: Path) -> Path:
        return next(iter(root.glob("*/*/*/*/")), root / "none")

    def state(self, folder: Path) -> str:
        begun = any((folder / name).is_file() for name in ("result.json", "status.json", "metrics.jsonl"))
        return state(folder) if begun else ""

    def waits(self, folder: Path, struck: Sequence[str]) -> bool:
        """Where its owner's file is damaged, a folder may be another's for STALE_SECONDS: here they pass at once."""
        damaged = any(sentence.startswith(OWNER) for sentence in struck)
        if damaged:
            os.utime(folder / OWNER, (0, 0))
        return damaged

    def outputs(self, folder: Path) -> dict[str, Any]:
        result = Result.read(folder / "result.json").to_json()
        rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
        return {
            **{f"adapter/{path.name}": _sha256(path) for path in (folder / "adapter").iterdir()},
            **{f"result.json: {key}": value for key, value in result.items() if key not in _NOT_OUTPUTS},
            "metrics.jsonl": [{key: value for key, value in row.items() if key != "time"} for row in rows],
            "predictions.json.gz": _sha256(folder / "predictions.json.gz"),
        }

    def steps(self, folder: Path) -> int:
        return _logged_steps(folder / "metrics.jsonl")

    def resumed(self, said: str) -> int | None:
        went_on = re.search(r"going on from step (\d+)", said)
        began = re.search(r"^step (0:|1/)", said, re.M)  # an attempt may be ended before it has done either
        return int(went_on[1]) if went_on else 0 if began else None

    def promised(self, folder: Path) -> int | None:
        if not (folder / "result.json").is_file():
            return None
        error = Result.read(folder / "result.json").error or ""
        step = re.search(r"checkpoint at step (\d+)", error)
        return int(step[1]) if step else 0


class Peer:
    """A script as its documentation has them: transformers' Trainer, PEFT's LoRA, resumed from the last checkpoint.

    Resumed from its last step it trains one step more, at a rate of zero: what it says of that is not compared.

    Args:
        model: The folder that `prepare` wrote.
    """

    name = "transformers"

    def __init__(self, model: Path):
        self._model = model

    def settings(self, rng: Random, number: int) -> Settings:
        return {
            "accumulated": rng.random() < 0.5,
            "evaluated": rng.random() < 0.5,
            "random": rng.random() < 0.5,
            "precision": rng.choice(("fp32", "bf16")),
            "workers": rng.choice((0, 0, 2)),
            "save_every": rng.choice((2, 3, 4, None)),
        }

    def main(self, drawn: Settings, root: Path) -> int:
        from sklearn.datasets import load_digits
        from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
        from transformers.trainer_utils import get_last_checkpoint

        output, steps = root / "run", root.with_suffix(".steps")
        images, labels = load_digits(return_X_y=True)
        pixels = torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, 8, 8)
        examples: Any = [{"pixel_values": pixels[i], "labels": int(labels[i])} for i in range(26)]

        class Steps(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                steps.write_text(json.dumps({"step": state.global_step}))

        set_seed(0)
        saved = drawn["save_every"]
        arguments = TrainingArguments(
            output_dir=str(output), max_steps=STEPS, learning_rate=0.01, logging_steps=1, use_cpu=True, seed=0,
            per_device_train_batch_size=1 if drawn["accumulated"] else 4,
            gradient_accumulation_steps=4 if drawn["accumulated"] else 1,
            eval_strategy="steps" if drawn["evaluated"] else "no", eval_steps=2, bf16=drawn["precision"] == "bf16",
            save_strategy="no" if saved is None else "steps", save_steps=saved or STEPS, save_total_limit=2,
            dataloader_num_workers=drawn["workers"], disable_tqdm=True, report_to="none",
        )  # fmt: skip
        trainer = Trainer(
            self._adapted(0.1 if drawn["random"] else 0.0), arguments, train_dataset=examples[:10],
            eval_dataset=examples[10:20], callbacks=[Steps()],
        )  # fmt: skip
        last = get_last_checkpoint(str(output)) if output.is_dir() else None
        print(f"going on from step {int(last.rpartition('-')[2]) if last else 0}", flush=True)
        trainer.train(resume_from_checkpoint=True if last else None)
        trainer.save_model(str(output / "adapter"))
        trainer.save_state()
        trainer.save_metrics("all", trainer.evaluate(examples[20:]))
        return 0

    def _adapted(self, dropout: float) -> torch.nn.Module:
        import peft
        from transformers import ViTForImageClassification

        model = ViTForImageClassification.from_pretrained(self._model, num_labels=10)
        targets = ["q_proj", "k_proj", "v_proj", "fc1", "fc2"]
        lora = peft.LoraConfig(target_modules=targets, lora_dropout=dropout, modules_to_save=["classifier"])
        return peft.get_peft_model(model, lora)

    def load(self, drawn: Settings, folder: Path, undisturbed: Path) -> int:
        import peft
        from transformers import ViTForImageClassification

        def tensors(adapter: Path) -> dict[str, torch.Tensor]:
            torch.manual_seed(0)
            model = ViTForImageClassification.from_pretrained(self._model, num_labels=10)
            return peft.PeftModel.from_pretrained(model, str(adapter)).state_dict()

        ours, theirs = tensors(folder / "adapter"), tensors(undisturbed / "adapter")
        same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        return LOADED if same else LOADED_DIFFERENT

    def folder(self, root: Path) -> Path:
        return root / "run"

    def state(self, folder: Path) -> str:
        if not folder.is_dir():
            return ""
        return "finished" if (folder / "all_results.json").is_file() else "dead"

    def waits(self, folder: Path, struck: Sequence[str]) -> bool:
        return False

    def outputs(self, folder: Path) -> dict[str, Any]:
        results = json.loads((folder / "all_results.json").read_text())
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        losses = [row for row in history if "loss" in row and row["step"] <= STEPS]
        timed = ("runtime", "per_second", "epoch")
        return {
            "adapter": _sha256(folder / "adapter" / "adapter_model.safetensors"),
            "results": {key: value for key, value in results.items() if not key.endswith(timed)},
            "losses": [(row["step"], row["loss"], row["grad_norm"]) for row in losses],
        }

    def steps(self, folder: Path) -> int:
        return min(STEPS, _logged_steps(folder.parent.with_suffix(".steps")))

    def resumed(self, said: str) -> int | None:
        went_on = re.search(r"going on from step (\d+)", said)
        return int(went_on[1]) if went_on else None

    def promised(self, folder: Path) -> int | None:
        return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _logged_steps(path: Path) -> int:
    """The last step of a file of JSON lines, torn ones left out."""
    steps = [0]
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(text)
        except ValueError:
            continue
        steps.append(row["step"] if isinstance(row, Mapping) and isinstance(row.get("step"), int) else 0)
    return max(steps)
