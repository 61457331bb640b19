"""Runs the tests against small changes of the code, which mutmut makes, in random order: hours, resumable.

    python scripts/mutate.py                                        # all that is not checked yet
    python scripts/mutate.py 'randlora/methods/*' --share 0.2       # a fifth of these files' mutants, at random
    python scripts/mutate.py --again                                # those that survived, after better tests
    python scripts/mutate.py --share 0.05 --seed 1 --record results.jsonl

mutmut makes the mutants, finds which tests reach which function, and keeps what comes of each mutant, so that its own
commands and scripts/mutants.py show it. Here the tests are collected once, and every mutant is a fork of that process:
mutmut alone would collect them anew for each, ten seconds that a test of a millisecond does not need. The tests of a
mutant begin with those that reach little else, and end after `--limit` seconds: who lives so long has survived.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest
from mutmut.configuration import config
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.state import state
from mutmut.stats import load_stats, status_by_exit_code
from mutmut.utils.file_utils import change_cwd, walk_mutatable_files
from mutmut.utils.format_utils import mangled_name_from_mutant_name

LIMIT = 60  # seconds; a test that takes as long is one that hangs
PATIENCE = 1200  # seconds for a mutant that waits for ever
SURVIVED, NO_TESTS, TIMEOUT = 0, 33, 36  # mutmut's exit codes
ONE = "randlora.tasks.text_metrics.x_bleu__mutmut_1"  # few tests reach it


class Forks:
    """A pytest plugin in whose place of the test loop every mutant is a fork that runs its own tests."""

    def __init__(self, pending: list[tuple[SourceFileMutationData, str]], workers: int, limit: int, record: Path):
        self.pending, self.workers, self.limit, self.record = pending, workers, limit, record
        self.running: dict[int, tuple[SourceFileMutationData, str, float]] = {}
        self.done: Counter[str] = Counter()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        reach = Counter(test for tests in state().tests_by_mangled_function_name.values() for test in tests)
        cost = {test: seconds * reach[test] for test, seconds in state().duration_by_test.items()}
        items = {item.nodeid: item for item in session.items}
        for data, mutant in self.pending:
            names = state().tests_by_mangled_function_name.get(mangled_name_from_mutant_name(mutant), set())
            tests = [items[name] for name in sorted(names & items.keys(), key=lambda name: (cost.get(name, 0), name))]
            if not tests:
                self.keep(data, mutant, NO_TESTS)
                continue
            while len(self.running) >= self.workers:
                self.reap()
            pid = os.fork()
            if not pid:
                os._exit(run(session, mutant, tests, self.limit))
            self.running[pid] = (data, mutant, time.monotonic())
        while self.running:
            self.reap()
        return True

    def reap(self) -> None:
        """Keeps what came of the mutants that have ended; ends those that hang."""
        time.sleep(0.02)
        for pid, (data, mutant, began) in list(self.running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended and time.monotonic() - began > PATIENCE:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                ended, status = pid, TIMEOUT << 8
            if ended:
                del self.running[pid]
                self.keep(data, mutant, os.waitstatus_to_exitcode(status))

    def keep(self, data: SourceFileMutationData, mutant: str, code: int) -> None:
        data.exit_code_by_key[mutant] = code
        data.save()
        outcome = status_by_exit_code[code]
        with self.record.open("a") as record:
            record.write(json.dumps({"mutant": mutant, "outcome": outcome}) + "\n")
        self.done[outcome] += 1
        print(f"{self.done.total()}/{len(self.pending)} {dict(self.done)}", file=sys.__stdout__, flush=True)


def run(session: pytest.Session, mutant: str, tests: list[pytest.Item], limit: int) -> int:
    """In a fork: 1 when a test fails with this mutant, 0 when none does in `limit` seconds of computing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    set_mutant_under_test(mutant)
    end = time.process_time() + limit
    resource.setrlimit(resource.RLIMIT_CPU, (round(end + LIMIT), resource.RLIM_INFINITY))  # SIGXCPU: mutmut's timeout
    try:
        for test, following in zip(tests, [*tests[1:], None], strict=True):
            session.config.hook.pytest_runtest_protocol(item=test, nextitem=following)
            if session.testsfailed:
                return 1
            if time.process_time() > end:
                break
    except BaseException:  # also what a mutant made of pytest's own
        return 1
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=["*"], help="patterns of files; all without one")
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--again", action="store_true", help="those that survived, in place of those not checked yet")
    parser.add_argument("--record", type=Path, default=Path(os.devnull), help="a JSONL file to add outcomes to")
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds of computing for the tests of a mutant")
    parser.add_argument("--workers", type=int, default=2, help="mutants at a time")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # threads of a pool would not live through a fork
    # Makes the mutants of what has changed and finds who tests what, beside running one of them.
    subprocess.run([sys.executable, "-m", "mutmut", "run", "--max-children", "1", ONE], check=True)
    load_stats()
    mutants = []
    for path in walk_mutatable_files():
        data = SourceFileMutationData(path=path)
        data.load()
        data.meta_path = data.meta_path.resolve()  # the tests run in another folder
        mutants += [
            (data, mutant, code)
            for mutant, code in data.exit_code_by_key.items()
            if any(fnmatch(path, pattern) for pattern in options.files)
        ]
    random.Random(options.seed).shuffle(mutants)
    drawn, wanted = mutants[: round(options.share * len(mutants))], (SURVIVED, NO_TESTS) if options.again else (None,)
    pending = [(data, mutant) for data, mutant, code in drawn if code in wanted]
    arguments = [*config().pytest_add_cli_args_test_selection, *config().pytest_add_cli_args]
    record = options.record.resolve()
    set_mutant_under_test("list_all_tests")
    with change_cwd("mutants"):
        sys.path.insert(0, os.getcwd())
        forks = Forks(pending, options.workers, options.limit, record)
        pytest.main(["--rootdir=.", "-q", "--tb=line", *arguments], plugins=[forks])


if __name__ == "__main__":
    main()
