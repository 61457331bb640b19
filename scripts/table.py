"""Tables of results: of a run folder, of a folder of runs, of a study or of all studies.

python scripts/table.py runs                       one row per run
python scripts/table.py runs --seeds               one row per method: mean ± sample deviation and median over seeds
python scripts/table.py runs --paired method=randlora,lora,vera
    scores under the first value of a setting less those under each of the others, seed by seed, with the 95 % interval
    of the mean (Student's t) and p corrected for the number of the table's comparisons (Holm)
python scripts/table.py runs --paired method=randlora,lora --examples
    the interval over seeds and test examples together (BCa bootstrap; p by flipping signs), from the runs' predictions
python scripts/table.py runs --best trainer.learning_rate,method.alpha
    of a search: the settings with the best validation score for each task, model, method and budget, and the runner-up
python scripts/table.py runs --metrics             every metric of the test set in its own unit, and before training
python scripts/table.py runs --published           means over seeds beside the paper's score for that cell
python scripts/table.py runs --columns method,seed,trainer.learning_rate,test/accuracy          one row per run of these
python scripts/table.py experiments/image_protocol --only collection=records task=cifar10       some of the runs

All but the first are Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from randlora.errors import SettingsError, exit_code
from randlora.records import read, state
from randlora.studies import tables
from randlora.studies.groups import check_keys, select


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", default="runs", type=Path)
    parser.add_argument("--only", metavar="KEY=VALUE", nargs="+", default=[], help="runs that have one of the values")
    parser.add_argument("--examples", action="store_true", help="with --paired: over seeds and test examples")
    tables_of = parser.add_mutually_exclusive_group()
    tables_of.add_argument("--seeds", action="store_true", help="mean and deviation over seeds")
    tables_of.add_argument("--paired", metavar="SETTING=A,B", help="differences between values of a setting")
    tables_of.add_argument("--best", metavar="SETTING,SETTING", help="the best settings of a search, by validation")
    tables_of.add_argument("--metrics", action="store_true", help="every metric of the test set")
    tables_of.add_argument("--published", action="store_true", help="beside the paper's scores")
    tables_of.add_argument("--columns", metavar="KEY,KEY", help="a row per run: settings, metrics, costs")
    options = parser.parse_args(arguments)
    records = read(options.root)
    results = select(records, options.only)
    if keys := options.best or options.columns:
        check_keys([record for record in records if record.status == "finished"], keys.split(","))
    if options.examples and not options.paired:
        raise SettingsError("--examples says what an interval of --paired is over: give both")
    unfinished = sum(result.status != "finished" for result in results)
    if options.paired:
        key, _, values = options.paired.partition("=")
        first, *others = values.split(",")
        if not others:
            raise SettingsError(f"--paired {options.paired}: give a setting and two values, method.rank=4,8")
        print(tables.differences(results, key, first, others, options.examples))
    elif options.best:
        print(tables.best(results, options.best.split(",")))
    elif options.published:
        print(tables.beside_published(results))
    elif options.metrics:
        print(tables.every_metric(results))
    elif options.seeds:
        print(tables.over_seeds(results))
    elif options.columns:
        print(tables.listing(results, options.columns.split(",")))
    else:
        unfinished = 0  # they are rows of it
        Console(width=None if sys.stdout.isatty() else 200).print(tables.each(results))
    if unfinished:
        print(f"{unfinished} of {len(results)} runs have not finished", file=sys.stderr)
    begun = (path.parent for path in options.root.rglob("status.json"))
    states = Counter(state(folder) for folder in begun if not (folder / "result.json").is_file())
    for name, count in states.items():
        print(f"{count} more without a result: {name}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(exit_code(main))
