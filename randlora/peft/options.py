"""What becomes of the settings in PEFT's configurations; docs/peft.md has a table of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "modules_to_save", "vera_dropout", "d_initial", "randlora_alpha", "randlora_dropout", "projection_prng_key",
    "init_lora_weights", "bias",
}  # fmt: skip
# Those that change neither the outputs nor the training of an adapter once it is there: its sites are those that have
# tensors. Any other must be as if it were not given.
WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "save_projection",
    "init_weights", "eva_config", "qalora_group_size", "megatron_core", "runtime_config",
}  # fmt: skip
NOT_GIVEN: tuple[Any, ...] = (None, False, {}, [])
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

_OTHER_WEIGHTS = "PEFT changes the frozen weights before training"
_OTHER_BASES = "its bases have entries of another distribution"
UNKNOWN = "it is not known what this means"
REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "the update acts from these tokens on, so it is no change of a matrix",
    "arrow_config": "it chooses among several adapters token by token, so it is no change of a matrix",
    "corda_config": _OTHER_WEIGHTS,
    "ensure_weight_tying": "what is tied is trained as one there, and here each of `modules_to_save` by itself",
    "init_lora_weights": "such a start changes the frozen weights, or (mica) freezes B",
    "kasa_config": "PEFT cuts the frozen weights, and trains a diagonal between A and B",
    "layer_replication": "it repeats layers, so it is another model",
    "loftq_config": _OTHER_WEIGHTS,
    "lora_bias": "B has a bias there, and an update here is a change of the matrix alone",
    "lora_ga_config": _OTHER_WEIGHTS,
    "megatron_config": "its layers are Megatron's parallel ones, which are no `nn.Linear`",
    "monteclora_config": "in training A is drawn at random, by further trained parameters",
    "sparse": _OTHER_BASES,
    "target_parameters": "it adapts parameters that are no linear maps, such as those of experts",
    "trainable_token_indices": "it trains rows of the embeddings, which are no linear map",
    "use_bdlora": "A or B is block-diagonal there, and a LoRA here would train the zeros, too",
    "use_qalora": "A takes means of groups of inputs there, so it has fewer columns than the site",
    "velora_config": "PEFT computes A's gradient from compressed inputs, so it trains along another path",
    "very_sparse": _OTHER_BASES,
}
