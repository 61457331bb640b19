"""Commonsense questions: prompts, the public sets rebuilt, losses, likelihoods and generation."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import settings, task
from letters import WORDS, Letters
from randlora.config import build
from randlora.data.loader import Split
from randlora.data.questions import question
from randlora.data.sources import HubTable, Joined, Source, Table
from randlora.data.subsets import subsample
from randlora.errors import SettingsError
from randlora.models.base import Backbone
from randlora.tasks.commonsense import common_prefix, first_answer, prompt
from randlora.training import Trainer
from randlora.training.evaluate import mean_loss

# Written out by hand from the published evaluation prompt: sixteen blanks before every line but the first.
GOLDEN_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n"
    "\n"
    "                ### Instruction:\n"
    "                Please choose the correct answer to the question: What is wet?\n"
    "\n"
    "Answer1: stone Answer2: water\n"
    "\n"
    "Answer format: answer1/answer2\n"
    "\n"
    "                ### Response:\n"
    "                "
)
PUBLIC_ROW = {
    "question": "What is wet?", "choices": {"text": ["stone", "water"], "label": ["A", "B"]}, "answerKey": "B",
}  # fmt: skip


def test_prompt_and_the_rebuilding_of_public_rows() -> None:
    assert prompt(question(PUBLIC_ROW).text) == GOLDEN_PROMPT
    assert question(PUBLIC_ROW).answer == "answer2"
    given = {"instruction": "Is it?\n\nAnswer format: true/false", "answer": "true"}
    assert question(given) == (given["instruction"], ["true", "false"], "true")
    quoted = {"instruction": "Is 'Answer format: a/b' it?\n\nAnswer format: true/false ", "answer": "true"}
    assert question(quoted).choices == ["true", "false"]
    with pytest.raises(ValueError, match="without 'Answer format: '"):
        question({"instruction": "Is it?", "answer": "true"})
    with pytest.raises(ValueError, match="columns premise is of no data set"):
        question({"premise": "x"})


# Each made by hand from the first or an early row of LLM-Adapters' test file.
REBUILT = [
    (
        {"question": "does ethanol take more energy make that produces", "passage": "", "answer": False},
        "Please answer the following question with true or false, question: does ethanol take more energy make that "
        "produces?\n\nAnswer format: true/false",
        "false",
        ["true", "false"],
    ),
    (
        {"goal": "How do you open it?", "sol1": "Turn it.", "sol2": "Burn it.", "label": 0},
        "Please choose the correct solution to the question: How do you open it?\n\nSolution1: Turn it.\n\n"
        "Solution2: Burn it.\n\nAnswer format: solution1/solution2",
        "solution1",
        ["solution1", "solution2"],
    ),
    (
        {
            "context": "Kendall got a new sports car.", "question": "What next?", "answerA": "drive it",
            "answerB": "show it off", "answerC": "clean it", "label": "2",
        },
        "Please choose the correct answer to the question: Kendall got a new sports car. What next?\n\n"
        "Answer1: drive it Answer2: show it off Answer3: clean it\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
        ["answer1", "answer2", "answer3", "answer4", "answer5"],
    ),
    (
        {
            "activity_label": "Playing drums", "ctx": "People are standing behind large drums. A man",
            "endings": ["is playing a bag pipe.", "starts to play.", "begins.", "ends."], "label": "3",
        },
        "Please choose the correct ending to complete the given sentence: Playing drums: People are standing behind "
        "large drums. A man\n\nEnding1: is playing a bag pipe. Ending2: starts to play. Ending3: begins. Ending4: "
        "ends.\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending4",
        ["ending1", "ending2", "ending3", "ending4"],
    ),
    (
        {"sentence": "Sarah was better than Maria so _ won.", "option1": "Sarah", "option2": "Maria", "answer": "1"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: Sarah was better than "
        "Maria so _ won.\n\nOption1: Sarah Option2: Maria Answer format: option1/option2",
        "option1",
        ["option1", "option2"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "text", "right", "recognised"), REBUILT)
def test_public_rows_become_the_published_instructions(row: dict, text: str, right: str, recognised: list) -> None:
    made = question(row)
    assert (made.text, made.answer, made.recognised) == (text, right, recognised)


def test_a_mixtures_accuracy_is_the_mean_of_its_sets() -> None:
    columns = {
        "set": ["boolq", "boolq", "boolq", "arc_easy"],
        "label": ["true", "false", "true", "answer1"],
        "predicted": ["true", "true", "", "answer1"],
    }
    scores = task("commonsense_mix").score(columns)
    assert scores == {
        "accuracy": pytest.approx((1 / 3 + 1) / 2), "answered": 0.75, "boolq/accuracy": pytest.approx(1 / 3),
        "arc_easy/accuracy": 1.0,
    }  # fmt: skip


def test_a_bounded_test_set_of_a_mixture_has_as_many_of_each(shared_data: Path) -> None:
    mix = build(settings("task=commonsense_mix", f"data_root={shared_data}", "task.test_size=7")["task"])
    tables = mix.open()
    rows = mix.test_rows(tables["test"])
    assert [tables["test"][row]["set"] for row in rows] == [
        name for name in ("boolq", "openbookqa", "arc_easy", "arc_challenge") for _ in range(7)
    ]
    assert len(tables["train"]) == 17_754
    assert question(tables["train"][0]).choices == ["true", "false"]


def test_the_rows_of_a_bounded_mixture_are_those_of_each_set_alone() -> None:
    sizes = {"boolq": 30, "piqa": 30, "arc_easy": 4}
    parts = {name: HubTable(Dataset.from_dict({"label": [0] * size})) for name, size in sizes.items()}
    mix = replace(task("commonsense_mix"), test_size=7)
    rows, starts = mix.test_rows(Joined(parts)).tolist(), {"boolq": 0, "piqa": 30, "arc_easy": 60}
    assert rows == [starts[name] + row for name, size in sizes.items() for row in subsample(size, 7, name)]
    assert mix.test_rows(parts["piqa"]).tolist() == subsample(30, 7, mix.name).tolist()  # of one set, as any task
    first, second = rows[:7], [row - 30 for row in rows[7:14]]
    assert first != second  # drawn by the set's name


def test_a_json_file_of_instructions_is_read(tmp_path: Path) -> None:
    """commonsense_15k.json and 170k are lists of rows, of which only the first columns matter."""
    rows = [{"instruction": f"Q{i}?\n\nAnswer format: true/false", "input": "", "answer": "true"} for i in range(30)]
    (tmp_path / "commonsense").mkdir()
    (tmp_path / "commonsense" / "commonsense_15k.json").write_text(json.dumps(rows))
    asked = ("task=commonsense_15k", f"data_root={tmp_path}", "task.tests=null")
    made = build(settings(*asked, "task.sizes.train=30")["task"])
    assert question(made.open()["train"][4]).text.startswith("Q4?")
    with pytest.raises(SettingsError, match="30 rows, expected 15119"):
        build(settings(*asked)["task"]).open()


def test_rebuilt_rows_look_like_the_published_ones(shared_data: Path) -> None:
    """Oracle: LLM-Adapters' own ARC-Easy file, taken apart and put together again."""
    import pyarrow.parquet as pq

    rows = pq.read_table(shared_data / "commonsense" / "ARC-Easy" / "test.parquet").to_pylist()
    checked = 0
    for row in rows[:200]:
        asked, _, rest = (
            row["instruction"].removeprefix("Please choose the correct answer to the question: ").partition("\n\n")
        )
        choices, _, _ = rest.partition("\n\nAnswer format:")
        texts = [part.partition(": ")[2].strip() for part in choices.split("Answer")[1:]]
        if choices.count("Answer") != choices.count(": "):
            continue
        rebuilt = {"question": asked, "choices": {"text": texts, "label": [*"ABCDE"[: len(texts)]]}}
        assert question(rebuilt | {"answerKey": "A"}).text == row["instruction"]
        checked += 1
    assert checked > 100


def test_the_first_answer_counts() -> None:
    words = ["answer1", "answer2", "answer3"]
    assert first_answer("the correct answer is answer3, not answer1", words) == "answer3"
    assert first_answer("I do not know", words) == ""
    assert common_prefix([[1, 2, 3], [1, 2, 4], [1, 2]]) == 2


ROWS = [
    {"instruction": "Which?\nAnswer format: answer1/answer2", "answer": "answer1"},
    {"instruction": "And which of all these?\nAnswer format: answer1/answer2/answer3", "answer": "answer3"},
    {"instruction": "Is it?\nAnswer format: true/false", "answer": "true"},
]


def test_labels_are_the_response_and_the_prompt_where_asked(language_model: Backbone) -> None:
    row = ROWS[0]
    everything = task("arc_easy", "max_length=1000").encoder(language_model, training=True)(row)
    assert everything["labels"] == everything["input_ids"]
    response = task("arc_easy", "max_length=1000", "train_on_inputs=false").encoder(language_model, training=True)(row)
    kept = [label for label in response["labels"] if label != -100]
    assert "".join(WORDS[i] for i in kept) == "the correct answer is answer1</s>"
    assert len(response["labels"]) == len(response["input_ids"])
    assert len(task("arc_easy", "max_length=50").encoder(language_model, training=True)(row)["input_ids"]) == 50


def test_causal_loss_and_weight_are_over_the_labelled_tokens(language_model: Backbone) -> None:
    """Oracle: transformers' own loss, row by row, weighted by tokens."""
    commonsense = task("arc_easy", "max_length=1000", "train_on_inputs=false")
    encoder, model = commonsense.encoder(language_model, training=True), commonsense.bind(language_model).model
    items = [encoder(row) for row in ROWS]
    batch = encoder.collate(items)
    total, count = 0.0, 0
    for item in items:
        ids, labels = torch.tensor([item["input_ids"]]), torch.tensor([item["labels"]])
        tokens = int((labels[:, 1:] != -100).sum())
        total += language_model.module(ids, labels=labels).loss.item() * tokens
        count += tokens
    assert commonsense.terms(batch) == count
    assert commonsense.loss(model, batch).item() == pytest.approx(total / count, rel=1e-5)


def test_a_plan_is_of_the_longest_texts_all_of_them_learned(language_model: Backbone) -> None:
    """Oracle: the batch of as many texts that are cut at that length."""
    commonsense = task("arc_easy", "max_length=6")
    encoder = commonsense.encoder(language_model, training=True)
    batch, planned = encoder.collate([encoder(row) for row in ROWS]), commonsense.sample(language_model, 3)
    for name in ("input_ids", "attention_mask"):
        assert (planned["inputs"][name].shape, planned["inputs"][name].dtype) == ((3, 6), torch.int64)
    assert torch.equal(planned["inputs"]["attention_mask"], batch["inputs"]["attention_mask"])
    assert torch.equal(planned["positions"], batch["positions"])
    assert (planned["targets"].shape, planned["targets"].dtype) == (batch["targets"].shape, torch.int64)


@pytest.mark.parametrize("answers", [["answer1", "answer2", "answer3"], ["true", "false"]])
def test_likelihoods_are_the_naive_ones(language_model: Backbone, answers: list[str]) -> None:
    """Oracle: each full text alone through the model, log-probabilities summed by hand."""
    commonsense = task("arc_easy", "scoring=likelihood")
    encoder, model = commonsense.encoder(language_model, training=False), commonsense.bind(language_model).model
    rows = [row for row in ROWS if row["answer"] in answers]
    predicted = commonsense.predict(model, encoder.collate([encoder(row) for row in rows]))["predicted"]
    for row, ours in zip(rows, predicted, strict=True):
        sums = {}
        for name in (name for name in answers if name in row["instruction"]):
            before = Letters()(prompt(row["instruction"]))["input_ids"]
            ids = Letters()(prompt(row["instruction"]) + f"the correct answer is {name}")["input_ids"]
            with torch.no_grad():
                logp = language_model.module(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums[name] = sum(logp[i - 1, ids[i]].item() for i in range(len(before), len(ids)))
        assert ours == max(sums, key=sums.__getitem__)


def test_answers_of_one_token_are_read_from_one_row_and_longer_ones_from_their_last_positions(
    language_model: Backbone,
) -> None:
    """Logits by hand: five tokens of -0.1 are likelier than four of -0.25; what is filled up counts nothing."""
    commonsense = task("arc_easy", "scoring=likelihood")
    encoder = commonsense.encoder(language_model, training=False)
    single = encoder.collate([encoder(row) for row in ROWS[:2]])
    assert "rows" not in single
    digits = [[WORDS.index(digit) for digit in "12"] + [-100], [WORDS.index(digit) for digit in "123"]]
    assert single["targets"].tolist() == digits
    batch = encoder.collate([encoder(ROWS[2])])
    assert batch["rows"] == [2]
    true, false = batch["targets"].tolist()
    assert ([WORDS[i] for i in true if i != -100], [WORDS[i] for i in false]) == ([*"true"], [*"false"])
    others = len(WORDS) - 1

    class Model:
        def logits(self, inputs, keep):  # type: ignore[no-untyped-def]
            assert keep == 6  # the five that are predicted from, and the last, from which nothing is
            scores = torch.zeros(2, keep, len(WORDS))
            for row, logp in ((0, -0.25), (1, -0.1)):
                for place, token in enumerate(batch["targets"][row].tolist()):
                    if token != -100:
                        scores[row, place, token] = math.log(math.exp(logp) / (1 - math.exp(logp)) * others)
            return scores

    assert commonsense.predict(Model(), batch)["predicted"] == ["false"]  # type: ignore[arg-type]


@pytest.mark.parametrize("beams", [1, 3])
def test_batched_generation_equals_one_by_one(language_model: Backbone, beams: int) -> None:
    """Oracle: transformers' generate on one question, which reads the prompt once for each beam."""
    commonsense = task("arc_easy", f"beams={beams}", "max_new_tokens=12")
    encoder, model = commonsense.encoder(language_model, training=False), commonsense.bind(language_model).model
    together = model.generate(encoder.collate([encoder(row) for row in ROWS])["inputs"], 0, beams, max_new_tokens=12)
    for row, made in zip(ROWS, together, strict=True):
        ids = torch.tensor([encoder(row)["input_ids"]])
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        alone = language_model.module.generate(**asked, num_beams=beams, max_new_tokens=12, do_sample=False)
        expected = Letters().batch_decode(alone[:, ids.shape[1] :])
        assert Letters().batch_decode(made[None]) == expected


def test_texts_that_begin_later_in_a_batch_have_their_own_positions(language_model: Backbone) -> None:
    """Oracle: each text alone, by a model that adds an embedding for each position; padding on the left has none."""
    torch.manual_seed(0)
    size = {"vocab_size": language_model.module.config.vocab_size, "n_positions": 512}
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, **size)).eval()
    commonsense, backbone = task("arc_easy"), replace(language_model, module=gpt2)
    encoder, model = commonsense.encoder(backbone, training=False), commonsense.bind(backbone).model
    items = [encoder(row) for row in ROWS]
    assert len({len(item["input_ids"]) for item in items}) > 1
    with torch.no_grad():
        together = model.logits(encoder.collate(items)["inputs"], keep=1)[:, -1]
        alone = [gpt2(torch.tensor([item["input_ids"]])).logits[0, -1] for item in items]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-6)


def test_the_validation_loss_is_over_the_labelled_tokens_of_all_examples(language_model: Backbone) -> None:
    """By which the best step is selected. Oracle: transformers' own loss, row by row, weighted by tokens."""
    commonsense = task("arc_easy", "max_length=1000")
    split = Split(ROWS, np.arange(3), commonsense.encoder(language_model, training=True))  # type: ignore[arg-type]
    losses, counts = [], []
    for ids in (torch.tensor([split[i, i]["input_ids"]]) for i in range(3)):
        losses.append(language_model.module(ids, labels=ids).loss.item())
        counts.append(ids.shape[1] - 1)
    expected = np.average(losses, weights=counts)
    model, accelerator = commonsense.bind(language_model).model, Trainer(device="cpu").accelerator()
    for batch_size in (1, 2, 3):
        loss = mean_loss(commonsense, model, split, accelerator, batch_size=batch_size)
        assert loss == pytest.approx(expected, rel=1e-5)
    assert abs(np.mean(losses) - expected) > 1e-4  # so that the weights matter


def test_answers_are_looked_for_in_what_the_model_writes(language_model: Backbone) -> None:
    """Each text's own words; the set that a question is from goes with it."""
    commonsense = task("arc_easy", "beams=3", "max_new_tokens=5")
    encoder, asked = commonsense.encoder(language_model, training=False), {}
    batch = encoder.collate([encoder(row | {"set": name}) for row, name in zip(ROWS, "abc", strict=True)])

    class Model:
        def generate(self, inputs, pad, **settings):  # type: ignore[no-untyped-def]
            asked.update(settings, inputs=inputs, pad=pad)
            texts = ["it is answer1 or answer2", "true or answer5", "no, false"]
            return [torch.tensor([WORDS.index(letter) for letter in text]) for text in texts]

    columns = commonsense.predict(Model(), batch)  # type: ignore[arg-type]
    assert columns == {
        "predicted": ["answer1", "answer5", "false"], "label": ["answer1", "answer3", "true"], "set": ["a", "b", "c"],
    }  # fmt: skip
    assert asked == {"inputs": batch["inputs"], "pad": 0, "num_beams": 3, "max_new_tokens": 5}
    assert encoder(ROWS[0])["set"] == ""


def test_a_mixture_looks_for_the_data_of_its_tests_too() -> None:
    class Found(Source):
        def open(self, split: str) -> Table:
            raise NotImplementedError

    class Missing(Found):
        def check(self) -> None:
            raise SettingsError("not there")

    found = replace(task("commonsense_mix"), source=Found(), tests=None)
    found.check()
    with pytest.raises(SettingsError, match="not there"):
        replace(found, tests=Missing()).check()
