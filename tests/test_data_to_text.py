"""Data to text: the metrics of the E2E challenge, the loss over references, the beam search."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import settings, task
from letters import WORDS, Letters
from randlora.config import build
from randlora.models.base import Backbone
from randlora.tasks import text_metrics
from randlora.tasks.base import Budget
from randlora.tasks.data_to_text import linearised

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


def test_bleu_is_a_part_of_one_and_the_other_metrics_are_as_they_are() -> None:
    expected = text_metrics.scores(MADE, REFERENCES)
    scores = task("e2e_nlg").score({"made": MADE, "references": REFERENCES})
    assert scores == expected | {"bleu": pytest.approx(0.4627201752)}


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


def test_texts_of_a_single_word() -> None:
    """Oracle: the definitions by hand; a text of one word has no bigram."""
    assert text_metrics.rouge_l(["pub"], [["pub"]]) == pytest.approx(1)
    # Three words, two of which are "pub": log2(3/2) bits; half of them, being 2/3 as long as the references' mean.
    assert text_metrics.nist(["pub"], [["pub", "the pub"]]) == pytest.approx(0.5 * math.log2(1.5))
    # Longer than the references costs nothing: two of three words match, of one bit each; the bigram says nothing new.
    assert text_metrics.nist(["the pub here"], [["the pub"]]) == pytest.approx(2 / 3)
    # Of the first text one word of three matches, all of weight log 2; two bigrams less; unigrams are one in four.
    expected = 10 * math.exp(-(2**2) / (2 * 6**2)) / math.sqrt(3) / 4 / 2
    assert text_metrics.cider(["pub", "x"], [["pub is here"], ["y"]]) == pytest.approx(expected)
    assert text_metrics.cider(["", "pub"], [["pub"], ["pub", ""]]) == 0  # a word of every text weighs nothing


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
    encoder, model = made.encoder(language_model, training=True), made.bind(language_model).model
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


def test_validation_has_a_loss_over_the_first_reference_of_every_meaning(
    language_model: Backbone, tmp_path: Path
) -> None:
    """By which the best step is selected; scored are all references."""
    rows = [("name[Aromi]", "Aromi is a pub."), ("name[Zizzi]", "Zizzi is a cafe."), ("name[Aromi]", "A pub is Aromi.")]
    (tmp_path / "e2e_nlg").mkdir()
    for split in ("train", "validation", "test"):
        lines = [json.dumps({"meaning_representation": meaning, "reference": text}) for meaning, text in rows]
        (tmp_path / "e2e_nlg" / f"{split}.jsonl").write_text("\n".join(lines))
    e2e = build(settings("task=e2e_nlg", f"data_root={tmp_path}", "task.sizes=null")["task"])
    splits = e2e.splits(language_model, Budget(0))
    labelled = splits.labelled
    texts = ["".join(WORDS[i] for i in labelled[row, row]["labels"] if i != -100) for row in range(len(labelled))]
    assert sorted(texts) == [" Aromi is a pub.</s>", " Zizzi is a cafe.</s>"]
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (3, 2, 2)
    assert splits.validation.table[0]["references"] == ["Aromi is a pub.", "A pub is Aromi."]


def test_a_text_begins_once(language_model: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with LLaMA's tokenizer, which puts a token before every text."""

    class Begun(Letters):
        def __call__(self, text: str, second: str = "", **options) -> dict:  # type: ignore[no-untyped-def]
            return super().__call__(f"#{text}", second, **options)

    monkeypatch.setattr(language_model, "tokenizer", Begun)
    row = {"meaning_representation": "name[Aromi]", "reference": "Aromi is a pub.", "references": []}
    trained, asked = (task("e2e_nlg").encoder(language_model, training)(row) for training in (True, False))
    assert "".join(WORDS[i] for i in trained["input_ids"]) == "#name : Aromi || Aromi is a pub.</s>"
    assert "".join(WORDS[i] for i in trained["labels"] if i != -100) == " Aromi is a pub.</s>"
    assert "".join(WORDS[i] for i in asked["input_ids"]) == "#name : Aromi ||"


def test_texts_repeat_the_prompts_words_but_not_their_own(language_model: Backbone) -> None:
    """Oracle: transformers' generate without the rule on one meaning, and the rule's definition."""
    made = task("e2e_nlg", "beams=2", "max_new_tokens=16", "no_repeat_ngram=2", "length_penalty=1")
    rows = [
        {"meaning_representation": meaning, "references": ["x"]}
        for meaning in ("name[Aromi]", "name[Zizzi], near[Aromi]")
    ]
    encoder, model = made.encoder(language_model, training=False), made.bind(language_model).model
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


def test_the_beam_search_is_that_of_loras_authors() -> None:
    """Their README: beams 10, length penalty 0.8, no 4-gram twice; what is written is stripped of blanks."""
    asked: dict = {}

    class Model:
        def generate(self, inputs, pad, **settings):  # type: ignore[no-untyped-def]
            asked.update(settings, inputs=inputs, pad=pad)
            return torch.tensor([[WORDS.index(letter) for letter in " ab "]])

    class Decoding(Letters):
        def batch_decode(self, rows, skip_special_tokens: bool = False) -> list[str]:  # type: ignore[no-untyped-def]
            assert skip_special_tokens  # transformers' default is to write them
            return super().batch_decode(rows)

    inputs = {"input_ids": torch.zeros(1, 7, dtype=torch.int64)}
    batch = {"inputs": inputs, "references": [["x"]], "tokenizer": Decoding()}
    assert task("e2e_nlg").predict(Model(), batch) == {"made": ["ab"], "references": [["x"]]}  # type: ignore[arg-type]
    (rule,) = asked.pop("logits_processor")
    assert (rule.rule.ngram_size, rule.prompt) == (4, 7)
    assert asked == {"inputs": inputs, "pad": 0, "num_beams": 10, "max_new_tokens": 64, "length_penalty": 0.8}
    task("e2e_nlg", "no_repeat_ngram=0").predict(Model(), batch)  # type: ignore[arg-type]
    assert asked["logits_processor"] is None


@pytest.mark.parametrize("metric", ["bleu", "nist", "rouge_l", "cider"])
def test_every_text_has_references(metric: str) -> None:
    for texts in (MADE[:-1], [*MADE, "One more."]):
        with pytest.raises(ValueError, match=r"zip\(\) argument|differ in length"):
            getattr(text_metrics, metric)(texts, REFERENCES)
