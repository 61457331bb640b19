"""What a seed stands for: starts, orders and subsets, recorded once. A change here changes every result."""

import numpy as np
import pytest
import torch
from test_methods import METHODS, NAMES, adapted

from randlora.data.loader import training_keys
from randlora.data.subsets import few_shot, fractional, split_validation, subsample
from randlora.methods import EDoRA, FullFineTuning, Method

# Σ tensor · cos(1, 2, …) over what seed 3 draws for the sites of a toy model; by the name of the method.
STARTS = {
    "LoRA-0": 3.25469, "DoRA-1": -4.08064, "DoRA-2": -4.08064, "VeRA-3": 8.57458, "VeRA-4": 15.10762,
    "VeRA-5": -7.24138, "VeRA-6": -18.04631, "NoLA-7": 22.85837, "NoLA-8": 22.44734, "NoLA-9": 30.29813,
    "NoLA-10": 13.64814, "RandLoRA-11": 9.52204, "RandLoRA-12": 30.55952, "RandLoRA-13": 17.43911,
    "RandLoRA-14": 29.63470, "RandLoRA-15": 10.21070, "RandLoRA-16": 10.17323, "RandLoRAa-17": -16.55487,
    "RandLoRAa-18": 6.52653, "MoRA-21": -2.52336, "MoRA-22": -2.52336, "MoRA-23": 0.0, "MoRA-24": 0.0, "MoRA-25": 0.0,
    "MELoRA-26": -1.23471, "MELoRA-27": -650.33770, "LoRAMini-28": 17.43488, "LoRTA-29": -6.26441,
    "LoRTA-30": -6.26441, "LoRTA-31": -6.26441, "FlatLoRA-32": 3.25469, "GeLoRA-33": 2.02108, "SoRA-34": 7.53032,
    "IncreLoRA-35": -0.73174, "RankedLoRA-36": 1.85473, "RankedDoRA-37": -5.48060,
}  # fmt: skip


@pytest.mark.parametrize(("name", "method"), zip(NAMES, METHODS, strict=True), ids=NAMES)
def test_a_method_starts_from_the_same_values_ever_after(name: str, method: Method) -> None:
    """But for what is made of the base's weights alone: full fine-tuning, and EDoRA's factors, of any signs."""
    if isinstance(method, EDoRA | FullFineTuning):
        assert name not in STARTS
        return
    model, _ = adapted(method, torch.float32)
    total = 0.0
    for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if ".updates." in tensor_name:
            values = tensor.detach().double().flatten()
            total += float(values @ torch.arange(1, len(values) + 1).double().cos())
    assert total == pytest.approx(STARTS[name], abs=2e-4)


def test_the_order_and_the_subsets_of_a_seed_are_the_recorded_ones() -> None:
    def order(**options: bool) -> list[list[int]]:
        return [[row for row, _ in step] for step in training_keys(10, 4, range(3), seed=5, **options)]

    assert order() == [[6, 9, 4, 5], [3, 2, 8, 7], [0, 1, 7, 8]]
    assert order(replacement=True) == [[1, 6, 4, 7], [9, 3, 1, 1], [8, 1, 8, 2]]
    train, validation = split_validation(12, 4, "x")
    assert (train.tolist(), validation.tolist()) == ([0, 1, 2, 3, 4, 6, 7, 10], [5, 8, 9, 11])
    assert few_shot(np.arange(20) % 2, 3, seed=5).tolist() == [3, 6, 7, 10, 15, 16]
    assert fractional(20, 0.2, seed=5).tolist() == [0, 6, 10, 13]
    assert fractional(20, 0.001, seed=5).tolist() == [10]
    assert subsample(20, 4, "x").tolist() == [3, 5, 15, 19]
    assert subsample(4, 4, "x").tolist() == [0, 1, 2, 3]
