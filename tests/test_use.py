"""A finished run's model asked, merged and exported. Oracles: its record, and the libraries that read the files."""

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import randlora
from conftest import REPOSITORY, settings
from letters import WORDS, Letters, llama, real_tokenizer
from randlora.analysis.campaign_programs import _make_model
from randlora.data.images import image_transform
from randlora.data.sources import Digits
from randlora.errors import FAILED, FINISHED, WRONG_SETTINGS, SettingsError
from randlora.experiment import Experiment
from randlora.methods import LoRA, Method, RandLoRA
from randlora.models import CausalLM, OpenClip, OpenClipVision, TextEncoder, TimmTransformer, VisionTransformer
from randlora.models.base import Backbone, Model
from randlora.records import Result
from randlora.records.predictions import read_columns
from randlora.run import run
from randlora.use.commands import generate_command
from randlora.use.generate import Generation, chat_prompt, generate
from randlora.use.merge import HEAD, export, merge
from randlora.use.predict import predict
from randlora.use.trained import Trained

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(model: Model, backbone: Backbone, targets: list[str], *overrides: str) -> Trained:
    """As after a run of these settings: an adapted model with its head, and every trained tensor has changed."""
    experiment = Experiment.from_config(settings(*overrides, "dry_run=true"))
    torch.manual_seed(0)
    randlora.adapt(backbone.module, LoRA(rank=2), targets)
    bound = experiment.task.bind(backbone)
    with torch.no_grad():
        for tensor in bound.trained().values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    bound.model.eval()
    return Trained(replace(experiment, model=model), backbone, bound)


def outputs(subject: Trained, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return subject.bound.model(images)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on digits with a linear head."""
    root = tmp_path_factory.mktemp("runs")
    short = ("trainer.max_steps=6", "trainer.batch_size=8", "task.test_size=20", "task.validation_size=10", "shots=2")
    composed = settings(f"run_root={root}", "model=clip_tiny_vision", "trainer.learning_rate=2e-3", *short)
    experiment = Experiment.from_config(composed)
    assert run(experiment, "as: given\n").code == FINISHED
    return experiment.folder


def digits(folder: Path, rows: list[int]) -> list[Path]:
    table = Digits().open("test")
    paths = [folder / f"{place:02}.png" for place in range(len(rows))]
    for path, row in zip(paths, rows, strict=True):
        table[row]["image"].save(path)
    return paths


def test_a_classifier_says_of_files_what_it_said_of_the_test_set(
    finished: Path, tmp_path: Path, program: Callable
) -> None:
    columns = read_columns(Result.read(finished / "result.json"))
    paths = digits(tmp_path, columns["row"])
    names = settings()["task"]["class_names"]
    expected = [names[label] for label in columns["predicted"]]
    assert len(set(expected)) > 1
    rows = list(predict(Trained.load(finished), [tmp_path], batch_size=7))
    assert [(row["input"], row["label"]) for row in rows] == list(zip(map(str, paths), expected, strict=True))
    for row, label, loss in zip(rows, columns["label"], columns["loss"], strict=True):
        assert row["scores"][names[label]] == pytest.approx(np.exp(-loss), rel=1e-3)
        assert row["score"] == max(row["scores"].values())
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"image": path.name}) + "\n" for path in paths[:5]))
    into = tmp_path / "said.csv"
    code = program(REPOSITORY / "train.py", "predict", finished, tmp_path / "list.jsonl", "--into", into)
    assert code == FINISHED
    said = list(csv.DictReader(into.open()))
    assert [(int(row["input"]), row["label"]) for row in said] == list(enumerate(expected[:5]))
    assert [float(row["score one"]) for row in said] == pytest.approx(
        [row["scores"]["one"] for row in rows[:5]], rel=1e-4
    )


def test_what_cannot_be_predicted_is_refused(
    finished: Path, tmp_path: Path, program: Callable, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "a.csv").write_text("picture\nbroken.png\n")
    (tmp_path / "b.csv").write_text("image\n3\n")
    (tmp_path / "c.jsonl").write_text(json.dumps({"image": None, "other": 1}) + "\n")
    (tmp_path / "none.csv").write_text("image\n")
    for arguments, code, said in (
        ([finished, tmp_path / "none.png"], WRONG_SETTINGS, "none.png: give files that are there"),
        ([finished, tmp_path / "empty"], WRONG_SETTINGS, "empty: no image there"),
        ([finished, tmp_path / "a.csv"], WRONG_SETTINGS, "the data have no column 'image'; they have picture"),
        ([finished, tmp_path / "broken.png"], FAILED, "failed: .*broken.png|failed: "),
        ([tmp_path, tmp_path / "broken.png"], WRONG_SETTINGS, "is not the folder of a run"),
        ([finished, tmp_path / "b.csv"], WRONG_SETTINGS, "row 0 has 3 as image: give the path of an image"),
        ([finished, tmp_path / "c.jsonl"], WRONG_SETTINGS, "row 0 has None as image: give the path of an image"),
        ([finished, tmp_path / "none.csv"], WRONG_SETTINGS, "none.csv cannot be read"),
        (
            [finished, tmp_path, "--into", tmp_path / "no" / "a.csv"],
            WRONG_SETTINGS,
            "there is no folder .*/no; make",
        ),
        ([finished, tmp_path, "--into", tmp_path / "a.txt"], WRONG_SETTINGS, "a.txt: name a .jsonl or a .csv file"),
    ):
        assert program(REPOSITORY / "train.py", "predict", *arguments) == code
        lines = capsys.readouterr().err.strip().splitlines()
        assert re.search(said, lines[-1]), lines


@pytest.mark.parametrize("size", [None, 40])
def test_open_clip_reads_what_was_merged(size: int | None, tmp_path: Path) -> None:
    import open_clip

    model = OpenClip("clip_tiny", image_size=size)
    backbone = model.load()
    subject = trained(model, backbone, ["*.c_fc", "*.in_proj"])
    images, texts = torch.rand(3, 3, size or 64, size or 64), backbone.tokenizer()(["a photo of a one", "two"])
    with torch.no_grad():
        expected = backbone.module.encode_image(images), backbone.module.encode_text(texts)
    assert merge(subject, tmp_path / "whole") == f"{tmp_path / 'whole'}: a plain checkpoint"
    other, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'whole'}")
    other.eval()
    with torch.no_grad():
        torch.testing.assert_close(other.encode_image(images), expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.encode_text(texts), expected[1], rtol=1e-5, atol=1e-5)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70, 3), dtype=np.uint8))
    torch.testing.assert_close(preprocess(image), image_transform(backbone.pixels, "none")(image))


def test_a_tower_with_a_head_is_merged_into_the_whole_clip_and_the_head(tmp_path: Path) -> None:
    import open_clip
    from safetensors.torch import load_file

    model = OpenClipVision("clip_tiny_vision")
    subject = trained(model, model.load(), ["*.c_fc"], "model=clip_tiny_vision")
    images = torch.rand(3, 3, 64, 64)
    expected = outputs(subject, images)
    assert "without a head" in merge(subject, tmp_path)
    other = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    head = load_file(tmp_path / HEAD)
    with torch.no_grad():
        logits = nn.functional.linear(other.encode_image(images), head["weight"], head["bias"])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_timm_reads_what_was_merged(tmp_path: Path) -> None:
    import timm

    model = TimmTransformer("tiny", "test_vit", pretrained=None, image_size=32)
    subject = trained(model, model.load(), ["*.attn.qkv", "*.mlp.fc1"], "model=dinov2_vit_b14")
    expected = outputs(subject, IMAGES)
    assert merge(subject, tmp_path).endswith("a plain checkpoint with its head")
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(other(IMAGES), expected, rtol=1e-5, atol=1e-5)
    assert other.pretrained_cfg["label_names"] == settings()["task"]["class_names"]


def test_transformers_reads_a_merged_vision_transformer(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    _make_model(tmp_path / "base")
    model = VisionTransformer("vit_tiny", weights=str(tmp_path / "base"), image_size=8)
    subject = trained(model, model.load(), ["*.q_proj", "*.fc1"], "model=vit_b16")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 20, 3), dtype=np.uint8))
    pixels = image_transform(subject.backbone.pixels, "none")(image)[None]
    expected = outputs(subject, pixels)
    assert merge(subject, tmp_path / "whole").endswith("a plain checkpoint with its head")
    other = AutoModelForImageClassification.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        torch.testing.assert_close(other(pixels).logits, expected, rtol=1e-5, atol=1e-5)
    assert other.config.id2label[2] == "two"
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "whole")(image, return_tensors="pt")["pixel_values"]
    assert (theirs - pixels).abs().max() < 0.05  # levels of 255 are .018 apart after the normalisation


@pytest.mark.parametrize("architecture", ["Roberta", "MPNet", "Bert"])
def test_transformers_reads_a_merged_text_classifier(architecture: str, tmp_path: Path) -> None:
    """With its head where transformers has the same one; with the head beside it for BERT."""
    import transformers
    from safetensors.torch import load_file

    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=80, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, pad_token_id=0,
        max_position_embeddings=40,
    )  # fmt: skip
    torch.manual_seed(0)
    module = getattr(transformers, f"{architecture}Model")(config, add_pooling_layer=False).eval()
    model = TextEncoder("tiny", head_hidden=True)
    backbone = model._backbone(module)
    backbone.tokenizer = Letters
    names = ["no", "yes", "perhaps"]
    task = ["task=sst2", f"task.class_names=[{','.join(names)}]", "task.texts=[text]"]
    subject = trained(model, backbone, ["*.q*", "*.intermediate.dense"], "model=roberta_base", *task)
    texts = ["abcabc", "hello", "why so long a text"]
    path = tmp_path / "texts.csv"
    path.write_text("text\n" + "\n".join(texts) + "\n")
    rows = list(predict(subject, [path]))
    before, after = [], []  # logits of the adapted model, which is not merged, and of the checkpoint
    for text in texts:
        inputs = {key: torch.tensor([ids]) for key, ids in Letters()(text).items()}
        with torch.no_grad():
            before.append(subject.bound.model(inputs)[0])
    said = merge(subject, tmp_path / "whole")
    for text in texts:
        inputs = {key: torch.tensor([ids]) for key, ids in Letters()(text).items()}
        with torch.no_grad():
            if architecture == "Bert":
                assert "the head in head.safetensors" in said
                other = transformers.AutoModel.from_pretrained(tmp_path / "whole", add_pooling_layer=False).eval()
                subject.bound.head.load_state_dict(load_file(tmp_path / "whole" / HEAD))
                after.append(subject.bound.head(other(**inputs).last_hidden_state[:, 0])[0])
            else:
                other = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
                assert list(other.config.id2label.values()) == names
                after.append(other(**inputs).logits[0])
    torch.testing.assert_close(torch.stack(after), torch.stack(before), rtol=1e-5, atol=1e-5)
    expected = torch.stack(after).softmax(-1)
    torch.testing.assert_close(
        torch.tensor([[*row["scores"].values()] for row in rows]), expected, rtol=1e-5, atol=1e-5
    )
    assert [row["label"] for row in rows] == [names[i] for i in expected.argmax(-1)]
    assert [row["input"] for row in rows] == [0, 1, 2]


def language(method: Method) -> Trained:
    backbone = llama()
    randlora.adapt(backbone.module, method, ["*.q_proj", "*.v_proj"])
    experiment = Experiment.from_config(settings("model=smollm2_135m", "task=e2e_nlg", "dry_run=true"))
    bound = experiment.task.bind(backbone)
    with torch.no_grad():
        for tensor in bound.trained().values():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    return Trained(replace(experiment, model=CausalLM("letters")), backbone, bound)


def greedy(model: nn.Module, prompt: str, begin: bool = True, beams: int = 1) -> str:
    """What transformers' own `generate` writes after one prompt, whose tokens are counted by hand."""
    ids = torch.tensor([[1] * begin + [WORDS.index(letter) for letter in prompt]])
    new = model.generate(ids, max_new_tokens=6, num_beams=beams, do_sample=False, pad_token_id=0)
    return Letters().batch_decode(new[:, ids.shape[1] :])[0]


PROMPTS = ["abc", "a longer one", "x"]


def test_texts_are_those_of_the_model_merged_or_not(tmp_path: Path) -> None:
    """Greedy and by beams, with prompts of several lengths in a batch; drawn ones come again with their seed."""
    from transformers import AutoModelForCausalLM

    subject = language(RandLoRA(rank=2))
    subject.backbone.tokenizer = real_tokenizer
    model, ids = subject.backbone.module, torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        logits = model(ids).logits
    expected = {beams: [greedy(model, prompt, beams=beams) for prompt in PROMPTS] for beams in (1, 3)}  # not merged
    for beams in (1, 3):
        assert list(generate(subject, PROMPTS, Generation(6, beams), batch_size=2)) == expected[beams]
    drawn = [list(generate(subject, PROMPTS, Generation(6, temperature=2.0, seed=seed))) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    merge(subject, tmp_path / "whole")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, logits, rtol=1e-5, atol=1e-5)
    for beams in (1, 3):
        assert [greedy(other, prompt, beams=beams) for prompt in PROMPTS] == expected[beams]
    with pytest.raises(SettingsError, match="has no chat template"):
        chat_prompt(subject, [{"role": "user", "content": "a"}])


def test_files_and_conversations_are_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """By the command, on a model that stands for a run's. Oracle: `greedy`, on the model as it was trained."""
    template = (
        "{% for each in messages %}{{ each.role }}: {{ each.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    subject = language(RandLoRA(rank=2))
    subject.backbone.tokenizer = partial(real_tokenizer, template)
    monkeypatch.setattr(Trained, "load", lambda *_: subject)
    model = subject.backbone.module

    def said(*arguments: str | Path) -> str:
        assert generate_command(["RUN", *map(str, arguments), "--max-new-tokens", "6"]) == FINISHED
        return capsys.readouterr().out

    texts = "".join(f"{greedy(model, prompt)}\n" for prompt in PROMPTS)
    assert len(texts) > 6
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (tmp_path / "prompts.csv").write_text("number,first words\n" + "".join(f"1,{text}\n" for text in PROMPTS))
    assert said(*(part for prompt in PROMPTS for part in ("--prompt", prompt))) == texts
    assert said("--file", tmp_path / "prompts.txt", "--batch", "2") == texts
    assert said("--file", tmp_path / "prompts.csv", "--column", "first words") == texts
    with pytest.raises(SettingsError, match="no column 'prompt'; they have number, first words"):
        said("--file", tmp_path / "prompts.csv")

    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand then\n"))
    first = greedy(model, "user: hello\nassistant:", begin=False)  # special tokens are the template's own affair
    second = greedy(model, f"user: hello\nassistant: {first}\nuser: and then\nassistant:", begin=False)
    assert said("--chat") == f"{first}\n{second}\n"


def test_peft_reads_what_was_exported(tmp_path: Path) -> None:
    from peft import PeftModel

    subject = language(LoRA(rank=2))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = subject.backbone.module(ids).logits
    assert export(subject, tmp_path / "peft").endswith("an adapter for PEFT")
    other = PeftModel.from_pretrained(llama().module, tmp_path / "peft").eval()
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_merged_or_generated_is_refused(
    finished: Path, tmp_path: Path, program: Callable, capsys
) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, said in (
        (["merge", finished, "--into", tmp_path / "full"], "something is there; name a new folder"),
        (["export", finished, "--into", tmp_path / "new"], "PEFT"),
        (["generate", finished, "--prompt", "a"], "clip_tiny_vision with task digits writes no texts"),
        (["generate", finished, "--prompt", "a", "--beams", "0"], "Generation.beams=0: must be a whole number"),
        (["generate", finished, "--prompt", "a", "--top-p", "0.5"], "give a temperature too"),
        (["generate", finished, "--file", tmp_path / "none"], "there is no such file"),
    ):
        assert program(REPOSITORY / "train.py", *arguments) == WRONG_SETTINGS
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert said in line
    assert not (tmp_path / "new").exists()
