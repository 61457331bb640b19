"""Tasks: losses, scores and prompts, each against an independent computation."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn

from conftest import settings
from randlora.config import build
from randlora.data.questions import question
from randlora.data.texts import pad
from randlora.errors import SettingsError
from randlora.models import CausalLM
from randlora.models.base import Backbone
from randlora.tasks import ImageCaptions, ImageClassification, text_metrics
from randlora.tasks.commonsense import common_prefix, first_answer, prompt
from randlora.tasks.data_to_text import linearised
from randlora.tasks.image_classification import ClipClassifier

WORDS = ["<pad>", "</s>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n#:.,?!/|'\""]


class Letters:
    """A tokenizer of single characters."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(self, text: str, second: str = "", **options) -> dict:  # type: ignore[no-untyped-def]
        ids = [WORDS.index(letter) for letter in text + second][: options.get("max_length")]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def batch_decode(self, rows, skip_special_tokens: bool = True) -> list[str]:  # type: ignore[no-untyped-def]
        return ["".join(WORDS[i] for i in row.tolist() if i > 1) for row in rows]


def task(name: str, *overrides: str):  # type: ignore[no-untyped-def]
    return build(settings(f"task={name}", *(f"task.{o}" for o in overrides))["task"])


@pytest.mark.parametrize(
    ("name", "oracles"),
    [
        ("mrpc", {"accuracy": accuracy_score, "f1": f1_score}),
        ("rte", {"accuracy": accuracy_score}),
        ("cola", {"matthews": matthews_corrcoef, "accuracy": accuracy_score}),
        ("sst2", {"accuracy": accuracy_score}),
        ("stsb", {"pearson": lambda y, p: pearsonr(y, p)[0], "spearman": lambda y, p: spearmanr(y, p)[0]}),
    ],
)
def test_glue_scores_are_the_official_metrics(name: str, oracles: dict) -> None:
    """Oracle: scikit-learn and SciPy, as GLUE's own script."""
    glue, rng = task(name), np.random.default_rng(0)
    label, predicted = rng.integers(0, 2, 50).tolist(), rng.integers(0, 2, 50).tolist()
    if name == "stsb":
        label, predicted = rng.uniform(0, 5, 50).tolist(), rng.uniform(0, 5, 50).tolist()
    scores = glue.score({"label": [float(y) for y in label], "predicted": predicted, "loss": [1.0] * 50})
    assert glue.headline == next(iter(oracles))
    for metric, oracle in oracles.items():
        assert scores[metric] == pytest.approx(oracle(label, predicted))


def test_a_constant_prediction_scores_zero_not_nan() -> None:
    scores = task("stsb").score({"label": [1.0, 2.0, 3.0], "predicted": [2.0] * 3, "loss": [0.0] * 3})
    assert scores["pearson"] == scores["spearman"] == 0.0


def test_texts_are_padded_and_masked() -> None:
    encoder = task("mrpc").encoder(Backbone(nn.Module(), "text", 4, tokenizer=Letters), training=True)
    items = [
        encoder({"sentence1": "ab", "sentence2": "c", "label": 1}),
        encoder({"sentence1": "d", "sentence2": "", "label": 0}),
    ]
    batch = encoder.collate(items)
    assert batch["inputs"]["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["inputs"]["input_ids"].shape == (2, 3)
    assert batch["label"].tolist() == [1.0, 0.0]
    assert pad([[5], [6, 7]], 0, side="left").tolist() == [[0, 5], [6, 7]]
    with pytest.raises(SettingsError, match="hidden labels"):
        encoder({"sentence1": "a", "sentence2": "b", "label": -1})


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


@pytest.fixture(scope="module")
def language_model() -> Backbone:
    """A random LLaMA over letters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    backbone = CausalLM("letters")._backbone(LlamaForCausalLM(config).eval())
    backbone.tokenizer = Letters
    return backbone


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
    encoder, model = commonsense.encoder(language_model, training=True), commonsense.bind(language_model)
    items = [encoder(row) for row in ROWS]
    batch = encoder.collate(items)
    total, count = 0.0, 0
    for item in items:
        ids, labels = torch.tensor([item["input_ids"]]), torch.tensor([item["labels"]])
        tokens = int((labels[:, 1:] != -100).sum())
        total += language_model.module(ids, labels=labels).loss.item() * tokens
        count += tokens
    assert commonsense.weight(batch) == count
    assert commonsense.loss(model, batch).item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("answers", [["answer1", "answer2", "answer3"], ["true", "false"]])
def test_likelihoods_are_the_naive_ones(language_model: Backbone, answers: list[str]) -> None:
    """Oracle: each full text alone through the model, log-probabilities summed by hand."""
    commonsense = task("arc_easy", "scoring=likelihood")
    encoder, model = commonsense.encoder(language_model, training=False), commonsense.bind(language_model)
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


@pytest.mark.parametrize("beams", [1, 3])
def test_batched_generation_equals_one_by_one(language_model: Backbone, beams: int) -> None:
    """Oracle: transformers' generate on one question, which reads the prompt once for each beam."""
    commonsense = task("arc_easy", f"beams={beams}", "max_new_tokens=12")
    encoder, model = commonsense.encoder(language_model, training=False), commonsense.bind(language_model)
    together = model.generate(encoder.collate([encoder(row) for row in ROWS])["inputs"], 0, beams, max_new_tokens=12)
    for row, made in zip(ROWS, together, strict=True):
        ids = torch.tensor([encoder(row)["prefix"]])
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        alone = language_model.module.generate(**asked, num_beams=beams, max_new_tokens=12, do_sample=False)
        expected = Letters().batch_decode(alone[:, ids.shape[1] :])
        assert Letters().batch_decode(made[None]) == expected


MADE = [
    "The Vaults is a cheap pub near the river.",
    "Blue Spice serves Italian food for less than £20; it isn't family-friendly.",
    "There is a coffee shop called Zizzi in the city centre.",
    "Aromi has a customer rating of 5 out of 5.",
]
REFERENCES = [
    ["The Vaults is a cheap pub by the river.", "Near the river there is a cheap pub, The Vaults."],
    ["Blue Spice is an Italian restaurant that isn't family-friendly. Prices are less than £20."],
    [
        "Zizzi is a coffee shop in the city centre.", "There is a coffee shop, Zizzi, in the centre of the city.",
        "In the city centre you'll find the coffee shop Zizzi.",
    ],
    ["Aromi is rated 5 out of 5 by its customers.", "Customers rate Aromi 5 out of 5."],
]  # fmt: skip


def test_text_metrics_are_the_challenges() -> None:
    """Oracle: measure_scores.py -p of github.com/tuetschek/e2e-metrics, run once on these texts with Java."""
    found = text_metrics.scores(MADE, REFERENCES)
    expected = {"bleu": 46.27201752, "nist": 4.5782307634, "rouge_l": 0.7040162275, "cider": 4.4458670056}
    if "meteor" in found:
        expected["meteor"] = 0.4278214488
    assert found == pytest.approx(expected, rel=1e-8)


def test_meteor_says_why_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_metrics.shutil, "which", lambda name: None)
    monkeypatch.setattr(text_metrics.importlib.util, "find_spec", lambda name: object())
    assert "there is no java" in (task("e2e_nlg").remark() or "")
    assert "meteor" not in text_metrics.scores(MADE, REFERENCES)
    with pytest.raises(RuntimeError, match="there is no java"):
        text_metrics.meteor(MADE, REFERENCES)


def test_perfect_and_empty_texts() -> None:
    perfect = text_metrics.scores([refs[0] for refs in REFERENCES], REFERENCES)
    assert (perfect["bleu"], perfect["rouge_l"]) == (pytest.approx(100), pytest.approx(1))
    empty = text_metrics.scores(["", "", "", ""], REFERENCES)
    assert [empty[name] for name in ("bleu", "nist", "rouge_l", "cider")] == [0, 0, 0, 0]


def test_meanings_are_scored_against_all_their_references(shared_data: Path, language_model: Backbone) -> None:
    made = build(settings("task=e2e_nlg", f"data_root={shared_data}")["task"])
    tables = made.open()
    assert [len(tables[split]) for split in ("train", "validation", "test")] == [42_061, 547, 630]
    assert len(tables["test"][0]["references"]) > 1
    assert sum(len(tables["test"][i]["references"]) for i in range(630)) == 4_693
    assert linearised(tables["train"][0]["meaning_representation"]) == (
        "name : The Vaults | Type : pub | price : more than £30 | customer rating : 5 out of 5 | near : Café Adriatic"
    )


def test_only_the_reference_is_learned(language_model: Backbone) -> None:
    """Oracle: transformers' loss of the row alone, and torch's label smoothing."""
    row = {"meaning_representation": "name[Aromi], eatType[pub]", "reference": "Aromi is a pub."}
    made = task("e2e_nlg")
    encoder, model = made.encoder(language_model, training=True), made.bind(language_model)
    item = encoder(row)
    assert "".join(WORDS[i] for i in item["input_ids"]) == "name : Aromi | Type : pub || Aromi is a pub.</s>"
    assert "".join(WORDS[i] for i in item["labels"] if i != -100) == " Aromi is a pub.</s>"
    batch = encoder.collate([item])
    ids, labels = torch.tensor([item["input_ids"]]), torch.tensor([item["labels"]])
    plain = language_model.module(ids, labels=labels).loss.item()
    assert task("e2e_nlg", "label_smoothing=0").loss(model, batch).item() == pytest.approx(plain, rel=1e-5)
    smoothed = F.cross_entropy(
        language_model.module(ids).logits[0, :-1], labels[0, 1:], ignore_index=-100, label_smoothing=0.1
    )
    assert made.loss(model, batch).item() == pytest.approx(smoothed.item(), rel=1e-5)


def test_texts_repeat_the_prompts_words_but_not_their_own(language_model: Backbone) -> None:
    """Oracle: transformers' generate without the rule on one meaning, and the rule's definition."""
    made = task("e2e_nlg", "beams=2", "max_new_tokens=16", "no_repeat_ngram=2", "length_penalty=1")
    rows = [
        {"meaning_representation": meaning, "references": ["x"]}
        for meaning in ("name[Aromi]", "name[Zizzi], near[Aromi]")
    ]
    encoder, model = made.encoder(language_model, training=False), made.bind(language_model)
    columns = made.predict(model, encoder.collate([encoder(row) for row in rows]))
    assert columns["references"] == [["x"], ["x"]]
    prompts = [[WORDS[i] for i in encoder(row)["input_ids"]] for row in rows]
    for text in columns["made"]:
        pairs = list(pairwise(text))
        assert len(set(pairs)) == len(pairs)
    free = task("e2e_nlg", "beams=2", "max_new_tokens=16", "no_repeat_ngram=0", "length_penalty=1")
    alone = encoder.collate([encoder(rows[0])])
    expected = language_model.module.generate(
        **alone["inputs"], num_beams=2, max_new_tokens=16, do_sample=False, pad_token_id=0
    )[:, len(prompts[0]) :]
    assert free.predict(model, alone)["made"] == [Letters().batch_decode(expected)[0].strip()]


class TwoTowers(nn.Module):
    """A CLIP of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(4, 8), nn.Linear(3, 8)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def encode_image(self, images):  # type: ignore[no-untyped-def]
        return self.image(images)

    def encode_text(self, tokens):  # type: ignore[no-untyped-def]
        return self.text(tokens.float())


NAMES = ["a", "b", "c", "d"]


def towers() -> Backbone:
    torch.manual_seed(0)
    codes = {f"{t} {n}": torch.randn(3) for n in NAMES for t in ("x", "y")}
    return Backbone(
        TwoTowers(), "clip", 8, tokenizer=lambda: lambda texts: torch.stack([codes[text] for text in texts])
    )


def naive_logits(model: TwoTowers, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    texts = torch.stack([F.normalize(F.normalize(model.encode_text(row), dim=-1).mean(0), dim=-1) for row in tokens])
    return model.logit_scale.exp() * F.normalize(model.encode_image(images), dim=-1) @ texts.T


@pytest.mark.parametrize("templates", [["x {}"], ["x {}", "y {}"]])
def test_clip_classifies_by_the_ensemble_of_prompts(templates: list[str]) -> None:
    backbone = towers()
    classifier = ClipClassifier(backbone, NAMES, templates, within_batch=False)
    images = torch.randn(5, 4)
    expected = naive_logits(backbone.module, images, classifier.tokens)  # type: ignore[arg-type]
    torch.testing.assert_close(classifier(images), expected)
    torch.testing.assert_close(classifier.eval()(images), expected)


def test_the_loss_within_the_batch_is_over_its_classes() -> None:
    backbone = towers()
    images, labels = torch.randn(5, 4), torch.tensor([3, 1, 3, 3, 1])
    whole = ImageClassification("t", None, {}, class_names=NAMES, templates=["x {}"], classes="all")  # type: ignore[arg-type]
    within = ImageClassification("t", None, {}, class_names=NAMES, templates=["x {}"], classes="batch")  # type: ignore[arg-type]
    batch = {"image": images, "label": labels}
    head = whole.bind(backbone)
    logits = naive_logits(backbone.module, images, head.tokens)  # type: ignore[arg-type]
    assert whole.loss(head, batch).item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    # As published: image i against the texts of all images, its target the first of its class; up to a constant.
    few = F.cross_entropy(logits[:, labels], torch.tensor([0, 1, 0, 0, 1])) - labels.bincount()[labels].log().mean()
    assert within.loss(within.bind(backbone), batch).item() == pytest.approx(few.item(), rel=1e-5)


def test_the_published_scale_is_not_exponentiated() -> None:
    backbone, images = towers(), torch.randn(5, 4)
    options: dict = {"class_names": NAMES, "templates": ["x {}"]}
    defined, published = (
        ImageClassification("t", None, {}, logit_scale=how, **options).bind(backbone)(images)  # type: ignore[arg-type]
        for how in ("exp", "raw")
    )
    scale = backbone.module.logit_scale
    torch.testing.assert_close(defined / scale.exp(), published / scale)


def test_an_ensemble_must_be_there() -> None:
    with pytest.raises(SettingsError, match="lists no templates"):
        ImageClassification("t", None, {}, class_names=NAMES, prompts="ensemble")  # type: ignore[arg-type]


def test_a_frozen_text_tower_gives_the_same_loss_and_no_gradient() -> None:
    backbone = towers()
    within = ImageClassification("t", None, {}, class_names=NAMES, templates=["x {}"], classes="batch")  # type: ignore[arg-type]
    batch = {"image": torch.randn(5, 4), "label": torch.tensor([3, 1, 3, 3, 1])}
    trained = within.loss(within.bind(backbone), batch)
    backbone.module.text.requires_grad_(False)  # type: ignore[union-attr, operator]
    head = within.bind(backbone)
    for _ in range(2):
        assert within.loss(head, batch).item() == pytest.approx(trained.item(), rel=1e-6)


def test_contrastive_loss_is_clips_when_all_captions_differ() -> None:
    """Oracle: CLIP's symmetric cross-entropy on the diagonal; true pairs off the diagonal are positives too."""
    pairs = ImageCaptions("t", None, {}, class_names=NAMES)  # type: ignore[arg-type]
    logits = torch.randn(4, 4)
    model = lambda images, tokens: logits  # noqa: E731
    batch = {
        "image": None,
        "tokens": None,
        "kind": torch.tensor([0, 0, 1, 2]),
        "general": torch.zeros(4, dtype=torch.bool),
    }
    labels = torch.arange(4)
    clip = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert pairs.loss(model, batch | {"label": labels}).item() == pytest.approx(clip.item(), rel=1e-5)
    # The caption of pair 1 names the kind alone, which image 0 shares: its column has two positives, and row 0 too.
    general = torch.tensor([False, True, False, False])
    mixed = pairs.loss(model, batch | {"label": labels, "general": general})
    rows, columns = logits.log_softmax(1), logits.log_softmax(0)
    to_text = rows.diagonal().clone()
    to_text[0] = (rows[0, 0] + rows[0, 1]) / 2
    to_image = columns.diagonal().clone()
    to_image[1] = (columns[0, 1] + columns[1, 1]) / 2
    assert mixed.item() == pytest.approx(-(to_text + to_image).mean().item() / 2, rel=1e-5)
