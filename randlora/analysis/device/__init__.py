"""What must hold on a device, check by check; `scripts/gpu.py` runs `CHECKS` in their order.

Errors are ‖found − expected‖ / ‖expected‖ (Frobenius, in float64).
"""

from collections.abc import Mapping

import torch

from randlora.analysis.device import runs, steps, updates
from randlora.analysis.device.place import Check

CHECKS: Mapping[str, Check] = {
    "layers in float32": updates.in_float32,
    "layers in tf32": updates.in_tf32,
    "layers in bfloat16": updates.in_bfloat16,
    "one output in every form": updates.one_output,
    "cached and checkpointed": updates.kept_or_computed_again,
    "beside PEFT": updates.beside_peft,
    "int8 base": updates.on_quantised("int8", torch.float32, 1e-4),
    "int4 base": updates.on_quantised("int4", torch.bfloat16, 5e-2),
    "NF4 base": updates.on_quantised("nf4", torch.float32, 1e-4),
    "paused and gone on": runs.gone_on,
    "killed and gone on": runs.killed,
    "two processes by gloo": runs.two_processes("gloo"),
    "two processes by NCCL": runs.two_processes("nccl"),
    "no wait in a step": steps.without_waiting,
    "memory and its plan": steps.plans_memory(steps.RUNS),
    "planner's constants": steps.constants,
    "planner's choice": steps.chosen_plans,
    "memory and its plan at real sizes": steps.plans_memory(steps.LARGE, large=True),
    **{f"step of {name}": steps.step_times(workload) for name, workload in steps.SIZES.items()},
    "compiled steps": updates.compiled,  # last, since it takes longest
}
