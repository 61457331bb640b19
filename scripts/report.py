"""A report of runs and studies, as `randlora report` writes it; with --index, the page over all committed studies.

python scripts/report.py RUNS|STUDY… --into FOLDER       see randlora/studies/report.py
python scripts/report.py --index > experiments/README.md
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from randlora.errors import exit_code
from randlora.studies import index, report

STUDIES = Path(__file__).resolve().parent.parent / "experiments"


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--index"]:
        print(index.page(STUDIES))
    else:
        report.main(arguments)


if __name__ == "__main__":
    sys.exit(exit_code(main))
