"""transformers' Trainer on an adapted model with a trained head; then one of its checkpoints as a plain model.

    python examples/hf_trainer.py

The model is a small LLaMA with random weights, made from a configuration, so nothing is downloaded; with a real one,
replace it by AutoModelForSequenceClassification.from_pretrained. The task: does token 7 occur in the text?
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainingArguments

import randlora
from randlora.methods import RandLoRA


def examples(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Texts of 16 tokens; half of them have token 7 somewhere."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, 64, (count, 16), generator=generator)
    labels = torch.arange(count) % 2
    places = torch.randint(0, 16, (count,), generator=generator)
    ids[labels == 1, places[labels == 1]] = 7
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def adapted() -> LlamaForSequenceClassification:
    """A small classifier with updates; the fixed bases come from adapt's seed."""
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, num_labels=2, pad_token_id=0,
        )
    )  # fmt: skip
    randlora.adapt(model, RandLoRA(rank=8), targets=["*.q_proj", "*.k_proj", "*.v_proj", "*.mlp.*_proj"])
    model.score.requires_grad_(True)  # the head; adapt froze it
    return model


def main() -> None:
    torch.manual_seed(0)
    model = adapted()
    print(f"training {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder, max_steps=200, per_device_train_batch_size=32, learning_rate=1e-2, save_steps=200,
                logging_strategy="no", report_to="none", disable_tqdm=True,
            ),
            train_dataset=examples(640, seed=1),
        )  # fmt: skip
        trainer.train()
        scores = trainer.predict(examples(200, seed=2))
        right = (scores.predictions.argmax(-1) == scores.label_ids).mean()
        print(f"accuracy on new texts: {right:.3f}")

        # The adapter and the head: small, for this library.
        randlora.save_adapter(model, Path(folder, "adapter"), {"score": model.score})

        # A plain checkpoint, for everybody else. Trainer's has the updates beside the weights: load it, and merge.
        fresh = adapted().eval()
        fresh.load_state_dict(load_file(Path(folder, "checkpoint-200", "model.safetensors")))
        randlora.merge(fresh).save_pretrained(Path(folder, "plain"))
        plain = LlamaForSequenceClassification.from_pretrained(Path(folder, "plain"))
        texts = torch.stack([example["input_ids"] for example in examples(20, seed=3)])
        with torch.no_grad():
            torch.testing.assert_close(plain(texts).logits, model.cpu().eval()(texts).logits, rtol=1e-5, atol=1e-5)
    print("merged, saved and loaded without randlora: the same outputs")


if __name__ == "__main__":
    main()
