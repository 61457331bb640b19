"""Runs to the hub and back: huggingface_hub's own client, and in the hub's place a server on this machine."""

import base64
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
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
from randlora.use.push import push
from randlora.use.trained import Trained

Files = dict[str, bytes]
COMMIT = "c" * 40


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
    changes: list[tuple[Callable[[Result], Result], str]] = [
        (lambda result: replace(result, status="interrupted"), "this run is interrupted"),
        (
            lambda result: replace(result, config=result.config | {"model": {"weights": str(tmp_path)}}),
            f"rests on model.weights={tmp_path}, a folder of this machine",
        ),
    ]
    for number, (change, said) in enumerate(changes):
        folder = Path(shutil.copytree(runs[0], tmp_path / f"run{number}"))
        change(Result.read(folder / "result.json")).write(folder / "result.json")
        with pytest.raises(SettingsError, match=said):
            push(folder, "me/net")
    assert not hub.asked
