"""The page over all studies of a folder: what each asks, what was run for it, and where its finding is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from randlora.records import Result, read
from randlora.studies.collect import RESULTS
from randlora.studies.tables import markdown

HEAD = """\
# Experiments

Every study with its evidence: its page says what was asked, run and found, negative findings too; `results.jsonl`
holds its results, and `curves.jsonl.gz` what was logged. `randlora report experiments --into FOLDER` makes tables,
figures and an interactive page of all of them. This page is made by
`python scripts/report.py --index > experiments/README.md`."""


def page(studies: Path) -> str:
    """A table of the folders in `studies` that have a page, by name."""
    names = ["study", "question", "runs", "methods", "models", "tasks", "found"]
    return f"{HEAD}\n\n{markdown(names, [_row(path) for path in sorted(studies.glob('*/README.md'))])}"


def _row(path: Path) -> list[str]:
    text = path.read_text()
    title = text.partition("\n")[0].removeprefix("# ")
    asked = re.search(r"^\*\*Questions?\.\*\*(.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    words = " ".join(re.sub(r"\]\((?!http)", f"]({path.parent.name}/", asked[1] if asked else "–").split())
    question = words.partition("? ")
    results = read(path.parent / RESULTS) if (path.parent / RESULTS).is_file() else []
    heading = re.search(r"^#+ (Findings?|What .* shows?)\b.*$", text, re.MULTILINE)
    anchor = "#" + re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading[0].lstrip("# ")).lower()) if heading else ""
    return [
        f"[{title}]({path.parent.name}/README.md)", question[0] + question[1].strip(), str(len(results) or "–"),
        *(_names(results, name) for name in ("method", "model", "task")),
        f"[finding]({path.parent.name}/README.md{anchor})",
    ]  # fmt: skip


def _names(results: Sequence[Result], name: str) -> str:
    """Up to five names, or their number."""
    names = sorted({getattr(result, name) for result in results})
    return (", ".join(names) if len(names) < 6 else str(len(names))) or "–"
