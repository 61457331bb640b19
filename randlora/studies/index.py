"""The page over all studies of a folder: what each asks, what was run for it, and where its finding is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from randlora.records import Result, read
from randlora.studies.collect import RESULTS
from randlora.studies.layouts import MISSING
from randlora.studies.tables import markdown

HEAD = """\
# Experiments

Every study with its evidence: its page says what was asked, run and found, negative findings too; `results.jsonl`
holds its results, and `curves.jsonl.gz` what was logged. `randlora report experiments --into FOLDER` makes tables,
figures and an interactive page of all of them. This page is made by
`python scripts/report.py --index > experiments/README.md`."""


def page(studies: Path) -> str:
    """A table of the folders in `studies` that have a page, by name."""
    names = ["study", "question", "runs", "methods", "models", "tasks", "finding"]
    return f"{HEAD}\n\n{markdown(names, [_row(path) for path in sorted(studies.glob('*/README.md'))])}"


def _row(path: Path) -> list[str]:
    text, page = path.read_text(), f"{path.parent.name}/README.md"
    title = text.partition("\n")[0].removeprefix("# ")
    asked = re.search(r"^\*\*Questions?\.\*\*(.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    sentences = re.split(r"(?<=[.:?;])\s", " ".join(asked[1].split()) if asked else "")
    question = next((sentence for sentence in sentences if sentence.endswith("?")), MISSING)
    results = read(path.parent / RESULTS) if (path.parent / RESULTS).is_file() else []
    names = (_names(results, name) for name in ("method", "model", "task"))
    # A browser scrolls to these words.
    finding = f"[finding]({page}#:~:text=Finding)" if re.search(r"^\*\*Findings?\b", text, re.MULTILINE) else MISSING
    return [f"[{title}]({page})", question, str(len(results) or MISSING), *names, finding]


def _names(results: Sequence[Result], name: str) -> str:
    """Up to five names, or their number."""
    names = sorted({getattr(result, name) for result in results})
    return (", ".join(names) if len(names) < 6 else str(len(names))) or MISSING
