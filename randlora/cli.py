"""The composition root: composes the settings of a command line, runs them, and says how it ended.

`randlora method=randlora model=clip task=cifar10` after installation, `python train.py …` in a clone. Exit codes:
0 finished or skipped, 1 failed, 2 wrong settings, 75 another process is running the run, 85 interrupted. Signals are
heard before anything else is imported; only Hydra is before the settings are known to compose, so that --help, --cfg
job and a typo answer at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from randlora.config import ALLOW, CONFIGS, plain, register_resolvers, version_base
from randlora.errors import FAILED, FINISHED, INTERRUPTED, WRONG_SETTINGS, SettingsError, exit_code
from randlora.overrides import explained
from randlora.signals import STOP, Interrupted

if TYPE_CHECKING:
    from omegaconf import DictConfig

COMMANDS = {  # beside training: where the function is that is given the arguments after the command's name
    "predict": "randlora.use.commands:predict_command",
    "generate": "randlora.use.commands:generate_command",
    "merge": "randlora.use.commands:merge_command",
    "export": "randlora.use.commands:export_command",
    "push": "randlora.use.commands:push_command",
    "spectra": "randlora.use.commands:spectra_command",
    "cka": "randlora.use.analysis_commands:cka_command",
    "landscape": "randlora.use.analysis_commands:landscape_command",
    "approximate": "randlora.use.analysis_commands:approximate_command",
    "forgetting": "randlora.use.analysis_commands:forgetting_command",
    "baselines": "randlora.baselines:main",
    "report": "randlora.studies.report:main",
    "status": "randlora.sweeps.status:main",
    "workspace": "randlora.studies.workspace:main",
}


def main() -> int:
    """Runs the command line of this process: a command, or one run or a sweep and the highest of their exit codes."""
    if sys.argv[1:] and sys.argv[1] in COMMANDS:
        return _command(*COMMANDS[sys.argv[1]].split(":"))
    with STOP:
        return _main()


def _command(module: str, name: str) -> int:
    try:
        return exit_code(lambda: getattr(import_module(module), name)(sys.argv[2:]))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINISHED


def _main() -> int:
    if {"--help", "-h"} & set(sys.argv[1:]):
        from randlora.usage import usage

        try:
            print(usage(sys.argv))
        except SettingsError as error:
            return _refused(error)
        return FINISHED
    import hydra

    from randlora.sweeps.launcher import register

    runs = Runs()
    register_resolvers()
    register()
    # Hydra would print a traceback's tail and exit with 1; with this it raises, and we can say it in a sentence.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if os.environ.get(ALLOW):
        sys.path.append(os.getcwd())  # a module of the user's own lies where the command is given
    try:
        with explained():
            hydra.main(**version_base(), config_path=str(CONFIGS), config_name="train")(runs)()
    except SettingsError as error:
        return _refused(error)
    finally:
        runs.conclude()
        _end_process_group()
    return max(runs.codes, default=FINISHED)


class Runs:
    """What Hydra calls with the settings of each run.

    Attributes:
        codes: The exit codes of the runs so far, to which a launcher adds those of other processes.
        conclude: What a launcher still has to say when all have run.
    """

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.conclude: Callable[[], None] = lambda: None

    def __call__(self, config: DictConfig) -> float | None:
        """Runs it; returns the validation score, which a sweeper may optimise."""
        if self.codes and STOP.came:
            sys.exit(INTERRUPTED)
        code, objective = execute(config)
        self.codes.append(code)
        # Asked to stop, the rest of a sweep stops too; and without one of its processes nothing else can be run.
        if code == INTERRUPTED or (code == FAILED and int(os.environ.get("WORLD_SIZE", 1)) > 1):
            sys.exit(code)
        return objective


def execute(config: DictConfig) -> tuple[int, float | None]:
    """One run, or its dry run: the exit code, and the validation score, which a sweeper may optimise."""
    from omegaconf import OmegaConf

    try:
        settings = plain(config)
        from randlora.experiment import Experiment
        from randlora.plan import dry_run, table
        from randlora.run import run

        if settings["dry_run"]:
            STOP.check()
        experiment = Experiment.from_config(settings)
        if settings["dry_run"] == "json":
            print(json.dumps(dry_run(experiment)))
            return FINISHED, None
        if settings["dry_run"]:
            from hydra.core.hydra_config import HydraConfig

            from randlora.origins import differences

            print(table(dry_run(experiment)), differences(config, HydraConfig.get()), sep="\n\n")
            return FINISHED, None
        outcome = run(experiment, OmegaConf.to_yaml(config, resolve=True))
        return outcome.code, outcome.objective
    except SettingsError as error:
        return _refused(error), None
    except Interrupted as error:
        print(f"{error}; nothing was begun", file=sys.stderr)
        return INTERRUPTED, None


def _refused(error: SettingsError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return WRONG_SETTINGS


def _end_process_group() -> None:
    """The threads of a distributed process group can otherwise abort Python's shutdown after all work is done."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
