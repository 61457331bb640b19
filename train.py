"""python train.py method=randlora model=clip task=cifar10: compose the settings, run them, say how it ended.

Exit codes: 0 finished or skipped, 1 failed, 2 wrong settings, 85 interrupted with a checkpoint to resume.
Only Hydra is imported before the settings are known to compose, so a typo answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from randlora.config import register_resolvers
from randlora.errors import FINISHED, INTERRUPTED, WRONG_SETTINGS, SettingsError

register_resolvers()
codes: list[int] = []  # of the runs of this command, one or a sweep


def execute(config: DictConfig) -> float | None:
    """One run; returns its validation score, which a sweeper may optimise."""
    try:
        settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        from randlora.experiment import Experiment
        from randlora.plan import dry_run, table
        from randlora.run import run

        experiment = Experiment.from_config(settings)
        if settings["dry_run"]:
            plan = dry_run(experiment)
            print(json.dumps(plan) if settings["dry_run"] == "json" else table(plan))
            codes.append(FINISHED)
            return None
        outcome = run(experiment, OmegaConf.to_yaml(config, resolve=True))
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        codes.append(WRONG_SETTINGS)
        return None
    codes.append(outcome.code)
    if outcome.code == INTERRUPTED:
        sys.exit(INTERRUPTED)  # asked to stop: the rest of a sweep stops too
    return outcome.objective


def main() -> int:
    if {"--help", "-h"} & set(sys.argv[1:]):
        from randlora.overrides import usage

        print(usage(Path(__file__).parent / "configs"))
        return 0
    # Hydra would print a traceback's tail and exit with 1; with this it raises, and we can say it in a sentence.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        hydra.main(version_base="1.3", config_path="configs", config_name="train")(execute)()
    except (HydraException, OmegaConfBaseException) as error:
        from randlora.overrides import explain

        print(f"error: {explain(error)}", file=sys.stderr)
        return WRONG_SETTINGS
    finally:
        _leave_the_others()
    return max(codes, default=FINISHED)


def _leave_the_others() -> None:
    """Ends the processes' group, whose threads can otherwise abort Python's shutdown after all work is done."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
