"""What `make mutants` has found so far: mutants killed, surviving and without tests, by file, and the score.

    python scripts/mutants.py                                   # the table
    python scripts/mutants.py --survivors 'randlora/methods/*'  # and what survives in these files

Survivors that no test can kill are listed with the reason in tests/mutants_equivalent.txt, as `--survivors` shows them;
they count neither way. The score is killed / (checked - equivalent); a mutant without a test is a survivor.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import walk_mutatable_files

EQUIVALENTS = Path("tests/mutants_equivalent.txt")
KILLED = ("killed", "timeout", "segfault")  # a mutant that runs for ever or crashes is one that tests see
COLUMNS = ("killed", "survived", "no tests", "equivalent", "not checked")

Change = tuple[str, ...]  # a function, the line before and the line after


def equivalents(text: str) -> dict[Change, str]:
    """The reasons by change: blocks of a function, lines that begin with - and +, and the reason."""
    reasons: dict[Change, str] = {}
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        if lines:
            function, reason = lines[0], " ".join(line for line in lines[1:] if line[0] not in "-+")
            if not reason:
                raise SystemExit(f"{EQUIVALENTS}: no reason for {function}")
            reasons[function, *(line for line in lines[1:] if line[0] in "-+")] = reason
    return reasons


def change(mutant: str, path: Path) -> Change:
    """What a mutant changes, without its number, which moves when its function changes."""
    module, _, mangled = mutant.partition("__mutmut_")[0].rpartition(".")
    function = mangled.removeprefix("xǁ").replace("ǁ", ".") if "ǁ" in mangled else mangled.removeprefix("x_")
    lines = [line for line in get_diff_for_mutant(mutant, path=path).splitlines() if line[:3] not in ("---", "+++")]
    return f"{module}.{function}", *(f"{line[0]} {line[1:].strip()}" for line in lines if line[:1] in ("-", "+"))


def mutants(path: Path) -> Iterator[tuple[str, str]]:
    """The file's mutants and what became of each: a column, as far as mutmut knows it."""
    data = SourceFileMutationData(path=path)
    data.load()
    for mutant, code in data.exit_code_by_key.items():
        status = status_by_exit_code[code]
        yield mutant, "killed" if status in KILLED else status if status in COLUMNS else "not checked"


def row(name: str, counts: Counter[str]) -> str:
    judged = sum(counts[column] for column in ("killed", "survived", "no tests"))
    score = f"{counts['killed'] / judged:.1%}" if judged else "-"
    return f"{name:44}" + "".join(f"{counts[column]:>13}" for column in COLUMNS) + f"{score:>9}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="?", default="*", help="a pattern of files; all without it")
    parser.add_argument("--survivors", action="store_true", help="show what survives and is not listed")
    options = parser.parse_args()
    reasons = equivalents(EQUIVALENTS.read_text())
    total: Counter[str] = Counter()
    surviving: list[Change] = []
    print(f"{'':44}" + "".join(f"{column:>13}" for column in COLUMNS) + f"{'score':>9}")
    for path in sorted(walk_mutatable_files()):
        if not fnmatch(str(path), options.files):
            continue
        counts: Counter[str] = Counter()
        for mutant, status in mutants(path):
            if status in ("survived", "no tests"):
                changed = change(mutant, path)
                status = "equivalent" if changed in reasons else status
                surviving += [] if changed in reasons else [changed]
            counts[status] += 1
        if counts.total():
            print(row(str(path), counts))
        total += counts
    print(row("in all", total))
    if options.survivors:
        print("", *("\n".join(lines) + "\n" for lines in surviving), sep="\n")


if __name__ == "__main__":
    main()
