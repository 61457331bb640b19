"""A storm of faults over whole runs: what is struck must end, by repeating its command, as the undisturbed run did.

A trial draws settings and faults from its number. It runs a program until a fault strikes, again and again, then once
more undisturbed, and compares what is there with a run of the same settings that nothing struck, without workers.
"""

from __future__ import annotations

import gc
import gzip
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1, SIGUSR2
from typing import Any, Protocol

from randlora.analysis.faults import DAMAGES, HUNG, AtCall, Ending, Signals, attempt, damage
from randlora.errors import BUSY, FINISHED, INTERRUPTED, WRONG_SETTINGS, check_choice

FAULTS = ("killed", "killed in a write", "signalled", "disk full", *DAMAGES)
STEPS, MOST_ATTEMPTS = 10, 6
LOADED, LOADED_DIFFERENT = FINISHED, 3  # how `Program.load` ends, or with WRONG_SETTINGS where it refuses

Settings = dict[str, Any]


class Program(Protocol):
    """What is under the storm: a command that trains for STEPS steps, and goes on where it was when repeated."""

    name: str

    def settings(self, rng: Random, number: int) -> Settings:
        """Those of a trial; `save_every` and `workers` among them must not change what comes out."""

    def main(self, settings: Settings, root: Path) -> int:
        """The command, which keeps all it writes below `root`; its exit code."""

    def load(self, settings: Settings, folder: Path, undisturbed: Path) -> int:
        """Loads the adapter of a run's folder; LOADED if it is that of the undisturbed run."""

    def folder(self, root: Path) -> Path:
        """Of the run; it need not be there."""

    def state(self, folder: Path) -> str:
        """What its record says: ``finished``, ``interrupted``, ``running``, …; empty where nothing was begun."""

    def waits(self, folder: Path, struck: Sequence[str]) -> bool:
        """Whether it refuses for a while, as after such damage another may run it; that is then over."""

    def outputs(self, folder: Path) -> dict[str, Any]:
        """What must be the same to the bit, by name, of a finished run."""

    def steps(self, folder: Path) -> int:
        """How many are logged."""

    def resumed(self, said: str) -> int | None:
        """The step that an attempt went on from, as it said; None where training was not reached."""

    def promised(self, folder: Path) -> int | None:
        """The step that an interrupted run says it will go on from; None where it says nothing."""


@dataclass
class Trial:
    """What became of one trial.

    Args:
        program, number, fault: Which one.
        settings: Of the run.
        struck: What struck it, one sentence each.
        codes: How the attempts ended.
        resumed: The steps that they went on from.
        lost: The steps, already logged, that they did again.
        identical: Whether it ended as the undisturbed run.
        different: What did not.
        unreadable: Undisturbed attempts that did not finish, and records that could not be read, a sentence each.
        false: What a record said and was not so.
        silent: Damage that was used without a word.
        tracebacks: Attempts that ended with one.
    """

    program: str
    number: int
    fault: str
    settings: Settings
    struck: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    identical: bool = False
    different: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    false: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    tracebacks: int = 0

    @property
    def clean(self) -> bool:
        """Whether nothing is to be mended."""
        return self.identical and not (self.unreadable or self.false or self.silent or self.tracebacks)


@dataclass(frozen=True)
class Reference:
    """A run that nothing struck: its folder, what came out, how long it took and how often it changed files."""

    folder: Path
    outputs: Mapping[str, Any]
    seconds: float
    calls: int


class Campaign:
    """Trials of one program.

    Args:
        program: What is struck.
        root: Where runs are kept while they are compared, and those of trials that were not clean for good.
        seed: Of everything drawn.
        faults: Which of FAULTS.
    """

    def __init__(self, program: Program, root: Path, seed: int = 0, faults: Sequence[str] = FAULTS):
        for fault in faults:
            check_choice("fault", fault, FAULTS)
        self.program, self.root, self.seed, self.faults = program, root / program.name, seed, faults
        self.root.mkdir(parents=True, exist_ok=True)
        self._references: dict[str, Reference] = {}

    def trials(self, done: Sequence[Trial], faults: int) -> Iterator[Trial]:
        """Trials beyond those `done`, each when it has ended, until they have all together seen so many faults."""
        gc.collect()
        gc.freeze()  # children then neither look through nor copy what is imported
        numbers, struck = {trial.number for trial in done}, sum(len(trial.struck) for trial in done)
        try:
            for number in count():
                if struck >= faults:
                    return
                if number not in numbers:
                    trial = self.trial(number)
                    struck += len(trial.struck)
                    yield trial
        finally:
            gc.unfreeze()

    def trial(self, number: int) -> Trial:
        """One trial, the same for the same seed, but for where a moment falls."""
        rng = Random(f"{self.seed} {number}")
        fault = self.faults[number % len(self.faults)]
        settings = self.program.settings(rng, number)
        storm = _Storm(self, Trial(self.program.name, number, fault, settings), rng)
        for _ in range(rng.choice((1, 2, 3))):
            storm.strike()
        while len(storm.trial.codes) < MOST_ATTEMPTS and not storm.ended:
            storm.run(None)
        storm.compare()
        if storm.trial.clean:
            shutil.rmtree(storm.kept)
        return storm.trial

    def reference(self, settings: Settings) -> Reference:
        """The undisturbed run of these settings, made once."""
        settings = settings | {"workers": 0, "save_every": 3}
        key = json.dumps(settings, sort_keys=True)
        if key not in self._references:
            kept = self.root / f"undisturbed_{len(self._references)}"
            shutil.rmtree(kept, ignore_errors=True)
            root = kept / "runs"
            root.mkdir(parents=True)
            ending = attempt(partial(self.program.main, settings, root), root, kept / "attempt.log")
            folder = self.program.folder(root)
            if ending.code != FINISHED or self.program.state(folder) != "finished":
                raise RuntimeError(f"the undisturbed run of {settings} ended with {ending.code}: {ending.said}")
            outputs = self.program.outputs(folder)
            self._references[key] = Reference(folder, outputs, ending.seconds, ending.calls)
        return self._references[key]

    def others(self, name: str, but: Path) -> list[Path]:
        """Files of this name of other undisturbed runs."""
        folders = [reference.folder for reference in self._references.values() if reference.folder != but]
        return [path for folder in folders for path in folder.rglob(name)]


class _Storm:
    """A trial while it goes."""

    def __init__(self, campaign: Campaign, trial: Trial, rng: Random):
        self.campaign, self.program, self.trial, self.rng = campaign, campaign.program, trial, rng
        self.reference = campaign.reference(trial.settings)
        self.seconds, self.calls = self.reference.seconds, int(1.3 * self.reference.calls)
        self.kept = campaign.root / f"trial_{trial.number}"
        shutil.rmtree(self.kept, ignore_errors=True)
        self.root = self.kept / "runs"
        self.root.mkdir(parents=True)
        self.ended = False  # by an undisturbed attempt, and nothing has struck since
        self.promise: int | None = None

    @property
    def folder(self) -> Path:
        return self.program.folder(self.root)

    def strike(self) -> None:
        """One fault more, if the run has not finished in spite of the one before."""
        if self.trial.fault in DAMAGES:
            self._damage()
            return
        if self.ended:
            return
        for _ in range(4):
            strike = self._draw()
            ending = self.run(strike)
            if ending.struck:
                self.trial.struck.append(f"{strike}")
                return
            if self.trial.struck:  # what was left to do was too short
                return
            self.seconds, self.calls = ending.seconds, ending.calls
            shutil.rmtree(self.root)  # the first fault strikes what has not finished
            self.root.mkdir()
            self.trial.codes.clear()
            self.ended = False

    def run(self, strike: Signals | AtCall | None) -> Ending:
        """One attempt, and what is to be said of it."""
        trial, before = self.trial, self.program.steps(self.folder)
        finished = trial.codes[-1:] == [FINISHED]  # whatever has been damaged since
        main = partial(self.program.main, trial.settings, self.root)
        log = self.kept / f"attempt_{len(trial.codes)}.log"
        ending = attempt(main, self.root, log, strike)
        trial.codes.append(ending.code)
        trial.tracebacks += "Traceback" in ending.said
        resumed = self.program.resumed(ending.said)
        if resumed is not None:
            if self.promise is not None and self.promise != resumed:
                trial.false.append(f"interrupted, to go on from step {self.promise}: it went on from {resumed}")
            if not finished:
                trial.lost.append(max(0, before - resumed))
            if resumed:
                trial.resumed.append(resumed)
        if ending.code != BUSY or not self.program.waits(self.folder, trial.struck):
            self._judge(ending, strike)
        self.ended = ending.code == FINISHED
        return ending

    def _judge(self, ending: Ending, strike: Signals | AtCall | None) -> None:
        """Whether the record is true."""
        trial, state, code = self.trial, self._state(), ending.code
        self.promise = self.program.promised(self.folder) if code == INTERRUPTED else None
        if code == HUNG:
            trial.unreadable.append("it hung")
        elif strike is None and code != FINISHED:
            trial.unreadable.append(f"an undisturbed attempt ended with {code}: {ending.said.strip()[-200:]}")
        if state.startswith("unreadable"):
            trial.unreadable.append(state)
        if (
            state == "running"
            or (code == FINISHED) > (state == "finished")
            or (code == INTERRUPTED and state == "dead")
        ):
            trial.false.append(f"{state or 'no record'} after exit code {code}")
        if state == "finished":
            trial.false.extend(f"finished, and {name} differs" for name in self._differences())

    def _state(self) -> str:
        try:
            return self.program.state(self.folder)
        except Exception as error:
            return f"unreadable: {error}"

    def _differences(self) -> list[str]:
        try:
            outputs = self.program.outputs(self.folder)
        except Exception as error:
            return [f"all ({error})"]
        expected = self.reference.outputs
        return sorted(name for name in {*outputs, *expected} if outputs.get(name) != expected.get(name))

    def compare(self) -> None:
        """The end of the trial."""
        self.trial.different = self._differences() if self.ended else ["it did not finish"]
        self.trial.identical = not self.trial.different

    def _draw(self) -> Signals | AtCall:
        rng, fault = self.rng, self.trial.fault
        moment = self.seconds * max(rng.random(), rng.random())  # the first half is loading
        if fault == "killed":
            return Signals((moment,), (SIGKILL,), group=rng.random() < 0.5)
        if fault == "signalled":
            first = rng.choice((SIGTERM, SIGINT, SIGUSR1, SIGUSR2))
            second = rng.random() < 0.25
            return Signals(
                (moment, rng.uniform(0, 0.5))[: 1 + second], (first, SIGINT)[: 1 + second], rng.random() < 0.5
            )
        full = fault == "disk full"
        return AtCall(rng.randint(1, self.calls), full, full and rng.random() < 0.5, rng.random())

    def _damage(self) -> None:
        """Runs until it has finished, or is killed in its second half; then a file of its folder is damaged."""
        rng, trial = self.rng, self.trial
        finish = rng.random() < 0.5
        if not self.ended:
            self.run(None if finish else AtCall(rng.randint(self.calls // 2, self.calls), part=rng.random()))
        places: dict[str, list[Path]] = {}
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            places.setdefault(place(path.relative_to(self.folder)), []).append(path)
        if not places:
            return
        path = rng.choice(places[rng.choice(sorted(places))])
        siblings = [other for other in path.parent.parent.glob(f"*/{path.name}") if other != path]
        others = siblings or self.campaign.others(path.name, self.reference.folder)
        done = damage(path, trial.fault, rng, others)
        trial.struck.append(f"{path.relative_to(self.folder)}: {done}")
        if place(path.relative_to(self.folder)) == "adapter" and self.ended:
            self._load(path)
        self.ended = False

    def _load(self, path: Path) -> None:
        """What becomes of a damaged adapter where it is loaded."""
        load = partial(self.program.load, self.trial.settings, self.folder, self.reference.folder)
        ending = attempt(load, self.root, self.kept / "load.log")
        if ending.code == LOADED_DIFFERENT:
            self.trial.silent.append(f"{path.name} of the adapter was loaded")
        elif ending.code == WRONG_SETTINGS and path.name not in ending.said and f"{path.parent}/" not in ending.said:
            self.trial.silent.append(f"refused without naming {path.name}: {ending.said.strip()[-200:]}")
        elif ending.code not in (LOADED, WRONG_SETTINGS):
            self.trial.tracebacks += 1


def place(path: Path) -> str:
    """The part of a run's folder that a file belongs to."""
    if path.parts[0].startswith("checkpoint"):
        return "checkpoint"
    return "adapter" if path.parts[0] == "adapter" else "record"


def read(path: Path) -> list[Trial]:
    """The trials of a file, one a line, compressed where it ends with .gz; none where it is not there."""
    if not path.is_file():
        return []
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return [Trial(**json.loads(row)) for row in text.splitlines()]


def line(trial: Trial) -> str:
    """The trial as a line of a file."""
    defaults = {item.name: item.default_factory() for item in fields(Trial) if callable(item.default_factory)}
    known = {name: value for name, value in asdict(trial).items() if value != defaults.get(name)}
    return json.dumps(known)


def table(trials: Sequence[Trial]) -> str:
    """Counts by program and kind of fault, as Markdown."""
    heads = (
        "program", "fault", "trials", "faults", "attempts", "resumed", "identical", "most lost, intervals",
        "unreadable", "false records", "silently used", "tracebacks",
    )  # fmt: skip
    rows = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for program in dict.fromkeys(trial.program for trial in trials):
        for fault in (*FAULTS, "all"):
            those = [t for t in trials if t.program == program and fault in (t.fault, "all")]
            if not those:
                continue
            intervals = [lost / (t.settings["save_every"] or STEPS) for t in those for lost in t.lost]
            counts = (
                len(those), *(sum(len(getattr(t, name)) for t in those) for name in ("struck", "codes", "resumed")),
                sum(t.identical for t in those), f"{max(intervals, default=0):.2f}",
                *(sum(len(getattr(t, name)) for t in those) for name in ("unreadable", "false", "silent")),
                sum(t.tracebacks for t in those),
            )  # fmt: skip
            rows.append(f"| {program} | {fault} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(rows)
