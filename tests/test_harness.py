"""EleutherAI's lm-evaluation-harness on a merged run, as the page says. Oracle: likelihoods added up token by token."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import randlora
from conftest import REPOSITORY
from letters import WORDS, llama, real_tokenizer
from randlora.methods import RandLoRA
from randlora.models import CausalLM

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'randlora[harness]'")

PAGE = (REPOSITORY / "docs" / "command_line.md").read_text()
QUESTIONS = [
    {"question": "Is it warm?", "choices": ["yes", "no", "perhaps"], "answer": 1},
    {"question": "What is 2 x 3?", "choices": ["5", "6"], "answer": 1},
    {"question": "Which is last?", "choices": ["abc", "xyz", "def"], "answer": 0},
]


def test_the_harness_scores_a_merged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.__main__ import cli_evaluate

    llama().module.save_pretrained(tmp_path / "base")
    real_tokenizer().save_pretrained(tmp_path / "base")
    model = CausalLM("letters", weights=str(tmp_path / "base"))
    backbone = model.load()
    randlora.adapt(backbone.module, RandLoRA(rank=2), ["*.q_proj", "*.v_proj"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (p for p in backbone.module.parameters() if p.requires_grad):
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))

    def likelihood(question: str, choice: str) -> float:
        asked, answer = ([WORDS.index(letter) for letter in text] for text in (f"{question}\nAnswer:", f" {choice}"))
        with torch.no_grad():
            logits = backbone.module(torch.tensor([[1, *asked, *answer]])).logits[0].double().log_softmax(-1)
        return sum(logits[len(asked) + place, token].item() for place, token in enumerate(answer))

    expected = [[likelihood(each["question"], choice) for choice in each["choices"]] for each in QUESTIONS]
    randlora.merge(backbone.module)
    (tmp_path / "FOLDER").mkdir()
    model.save(backbone, tmp_path / "FOLDER", None, [])

    (tmp_path / "TASKS").mkdir()
    (tmp_path / "TASKS" / "task.yaml").write_text(re.findall(r"```yaml\n(task: .*?)```", PAGE, re.DOTALL)[0])
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    (line,) = re.findall(r"^lm_eval .*--include_path TASKS.*$", PAGE, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*shlex.split(line, comments=True), "--output_path", "said", "--log_samples"])
    cli_evaluate()
    (results,), (samples,) = (list((tmp_path / "said").rglob(name)) for name in ("results_*.json", "samples_*.jsonl"))
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    said = [[float(answer[0][0]) for answer in row["resps"]] for row in rows]
    assert said == [pytest.approx(row, rel=1e-5) for row in expected]
    right = [row.index(max(row)) == each["answer"] for row, each in zip(expected, QUESTIONS, strict=True)]
    accuracy = json.loads(results.read_text())["results"]["plain_questions"]["acc,none"]
    assert accuracy == pytest.approx(sum(right) / len(right))
