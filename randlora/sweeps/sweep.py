"""Which runs a sweep has, and what tells them apart: ``run_root/sweeps/ID/sweep.json``.

The file says what the sweep is, and is written before anything starts. How its runs stand is read from their folders
alone, so that nothing has to be brought up to date when a process is killed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from randlora.errors import SettingsError
from randlora.integrity import Damaged, digest, read_json, write_json
from randlora.records import state
from randlora.records.lock import OWNER, living
from randlora.records.result import Result
from randlora.records.signature import EXCLUDED_FROM_HASH
from randlora.records.versions import commit

SWEEPS, NAME = "sweeps", "sweep.json"
TO_DO = "to do"
FAILURES = ("failed", "diverged", "out_of_memory")  # what a sweep runs again only where it is told to
ORDER = (
    "running",
    "dead",
    "interrupted",
    "damaged",
    *FAILURES,
    TO_DO,
    "paused",
    "finished",
)  # in which states are shown


@dataclass(frozen=True)
class Job:
    """A run of a sweep.

    Args:
        label: The settings that the sweep chose for it.
        folder: Its run's folder, below the run root.
        steps: How many it has, by the published size of its training set.
    """

    label: str
    folder: str
    steps: int


@dataclass(frozen=True)
class Sweep:
    """What was asked for, and the runs that this makes.

    Args:
        root: The run root.
        command: The overrides of the command line, as they were given.
        sweeper: The settings of Hydra's sweeper.
        jobs: The runs, in their order.
        commit: Of the code that last made or continued it.
        time: When that was, in seconds since 1970.
    """

    root: Path
    command: Sequence[str]
    sweeper: Mapping[str, Any]
    jobs: Sequence[Job] = ()
    commit: str | None = None
    time: float = field(default_factory=time.time)

    @classmethod
    def asked(cls, config: Any) -> Sweep:
        """The sweep that Hydra's settings ask for, without its runs."""
        command: Any = OmegaConf.to_container(config.hydra.overrides.task)
        sweeper: Any = OmegaConf.to_container(config.hydra.sweeper)
        return cls(Path(config.hydra.sweep.dir), command, sweeper, commit=commit())

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits, equal for commands that differ in settings EXCLUDED_FROM_HASH alone."""
        decisive = sorted(override for override in self.command if not _excluded(override))
        return digest({"command": decisive, "sweeper": self.sweeper})[:12]

    @property
    def folder(self) -> Path:
        """``sweeps/ID`` in the run root: sweep.json, and what its processes said."""
        return self.root / SWEEPS / self.id

    @classmethod
    def read(cls, path: Path) -> Sweep:
        """The sweep of a sweep.json; Damaged where it is missing or is not what was written."""
        content = read_json(path)
        try:
            jobs = [Job(**job) for job in content.pop("jobs")]
            return cls(path.parents[2], jobs=jobs, **content)
        except (TypeError, LookupError) as error:
            raise Damaged(f"{path} is no sweep: {error}") from error

    def write(self) -> None:
        """Writes sweep.json, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = asdict(self)
        del content["root"]
        write_json(self.folder / NAME, content)

    def with_jobs(self, jobs: Iterable[Job]) -> Sweep:
        """The sweep with these jobs, too; of two with one label the new one."""
        by_label = {job.label: job for job in (*self.jobs, *jobs)}
        return replace(self, jobs=[*by_label.values()])

    def changes(self, now: Sweep) -> list[str]:
        """What is another than in this earlier state of the sweep, a sentence each."""
        when, sentences = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.time)), list[str]()
        if self.commit != now.commit:
            commits = f"{self.commit or 'unknown'}, and is {now.commit or 'unknown'} now"
            sentences.append(f"the code's commit was {commits}; resume=false runs again what has finished")
        folders = {job.label: job.folder for job in self.jobs}
        other = [job.label for job in now.jobs if folders.get(job.label, job.folder) != job.folder]
        if other:
            sentences.append(f"the settings behind {len(other)} jobs have changed: they are new runs ({other[0]}, …)")
        return [f"since this sweep was last made ({when}), {sentence}" for sentence in sentences]


class Standing(NamedTuple):
    """How a run stands: one of ORDER, and why or where, in words."""

    state: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.state}: {self.why}" if self.why else self.state


def standing(folder: Path) -> Standing:
    """How the run of a folder stands, whether or not it was begun."""
    if not any((folder / name).is_file() for name in ("result.json", "status.json", OWNER)):
        return Standing(TO_DO)
    try:
        name = state(folder)
        if name == "running":
            owner = living(folder)
            return Standing(name, f"process {owner.pid} on {owner.host}" if owner else "")
        if name in ("dead", "finished"):
            return Standing(name)
        return Standing(name, Result.read(folder / "result.json").error or "")
    except SettingsError as error:
        return Standing("damaged", str(error))


def _excluded(override: str) -> bool:
    """Whether an override of the command line sets what changes no result."""
    key = override.partition("=")[0].lstrip("+~").partition("@")[0]
    return key in EXCLUDED_FROM_HASH or key.partition(".")[0] in EXCLUDED_FROM_HASH
