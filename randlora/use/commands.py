"""The commands on finished runs: their arguments, and where what they say goes."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from randlora.bounds import count
from randlora.data.loader import Unreadable
from randlora.data.sources import FILES, HubTable, read_file
from randlora.errors import FAILED, FINISHED, SettingsError
from randlora.integrity import write
from randlora.use.generate import Generation, chat_prompt, generate
from randlora.use.merge import export, merge
from randlora.use.predict import predict, table_of, written
from randlora.use.push import push
from randlora.use.sample import named
from randlora.use.spectra import QUANTITIES, Look, spectra
from randlora.use.trained import Trained

RUN = "the folder of a finished run, or hub:OWNER/NAME"


def predict_command(arguments: Sequence[str]) -> int:
    """randlora predict RUN INPUT …"""
    parser = _parser("predict", "Labels and scores of images or texts, by a classifier that a run has trained.")
    parser.add_argument("inputs", type=Path, nargs="+", metavar="INPUT", help=f"images, folders, or one {_endings()}")
    parser.add_argument("--into", type=Path, help="a .jsonl or .csv file; without it, JSON lines on the screen")
    parser.add_argument("--batch", type=count, default=64, help="inputs at a time")
    options = parser.parse_args(arguments)
    check_into(options.into, (".jsonl", ".csv"))
    rows = predict(_trained(options), options.inputs, options.batch)
    try:
        if options.into:
            write(options.into, written(rows, options.into.suffix))
        else:
            for row in rows:
                print(written([row], ".jsonl"), end="", flush=True)
    except Unreadable as error:
        print(f"failed: {error}", file=sys.stderr)
        return FAILED
    return FINISHED


def generate_command(arguments: Sequence[str]) -> int:
    """randlora generate RUN --prompt TEXT …"""
    parser = _parser("generate", "Texts by a language model that a run has trained.")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", action="append", help="what is gone on from; may be given several times")
    asked.add_argument("--file", type=Path, help=f"a text file with a prompt a line, or {_endings()} with --column")
    asked.add_argument("--chat", action="store_true", help="a conversation, by the tokenizer's chat template")
    parser.add_argument("--column", default="prompt", help="of --file")
    parser.add_argument("--batch", type=count, default=8, help="prompts at a time")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0: drawn at random")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    names = ("max_new_tokens", "beams", "temperature", "top_p", "seed")
    settings = Generation(**{name: getattr(options, name) for name in names})
    prompts = options.prompt or (_prompts(options.file, options.column) if options.file else [])
    trained = _trained(options)
    if options.chat:
        with suppress(EOFError, KeyboardInterrupt):
            for text in _conversation(trained, settings):
                print(text, flush=True)
        return FINISHED
    for text in generate(trained, prompts, settings, options.batch):
        print(text, flush=True)
    return FINISHED


def merge_command(arguments: Sequence[str]) -> int:
    """randlora merge RUN --into FOLDER"""
    parser = _parser("merge", "A plain checkpoint of transformers, open_clip or timm, with the updates in its weights.")
    parser.add_argument("--into", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args(arguments)
    print(merge(_trained(options), options.into))
    return FINISHED


def export_command(arguments: Sequence[str]) -> int:
    """randlora export RUN --into FOLDER"""
    parser = _parser("export", "The updates in another library's format.")
    parser.add_argument("--into", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--format", choices=["peft"], default="peft")
    options = parser.parse_args(arguments)
    print(export(_trained(options), options.into))
    return FINISHED


def push_command(arguments: Sequence[str]) -> int:
    """randlora push RUN OWNER/NAME"""
    parser = argparse.ArgumentParser(prog="randlora push", description="A finished run to the Hugging Face hub.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("repository", metavar="OWNER/NAME", help="made where there is none")
    parser.add_argument("--licence", "--license", help="as the hub calls it, such as mit")
    parser.add_argument("--private", action="store_true", help="where it is made now")
    parser.add_argument("--peft", action="store_true", help="PEFT's files, too")
    options = parser.parse_args(arguments)
    print(push(options.run, options.repository, options.licence, options.private, options.peft))
    return FINISHED


def spectra_command(arguments: Sequence[str]) -> int:
    """randlora spectra RUN …"""
    parser = argparse.ArgumentParser(
        prog="randlora spectra",
        description="Spectrum, rank, size and alignment of the update at every site.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=RUN)
    parser.add_argument("--any-base", action="store_true", help="on other weights than the runs'")
    parser.add_argument("--directions", type=count, default=8, help="how many singular directions count")
    parser.add_argument("--likeness", type=float, default=0.5, help="the cosine below which a direction is an intruder")
    parser.add_argument(
        "--into", type=Path, help="a .csv file, in place of the screen; a .jsonl file is given the means, a row a run"
    )
    parser.add_argument("--figure", type=Path, action="append", default=[], help="such as figure.svg")
    options = parser.parse_args(arguments)
    check_into(options.into, (".csv", ".jsonl"))
    for path in options.figure:
        check_into(path, (".svg", ".png", ".pdf"), "--figure")
    look, several = Look(options.directions, options.likeness), len(options.runs) > 1
    table, means = [], []
    for run, folder in named(options.runs).items():
        subject = Trained.load(folder, "any" if options.any_base else "same")
        rows = [dataclasses.asdict(site) for site in spectra(subject.backbone.module, look)]
        values = [round(statistics.mean(place), 6) for place in zip(*(row.pop("values") for row in rows), strict=True)]
        mean = {name: statistics.mean(row[name] for row in rows) for name in QUANTITIES}
        first = {"run": run} if several else {}
        table += [{**first, **row, "shape": "x".join(map(str, row["shape"]))} for row in rows]
        table += [{**first, "site": "mean", "shape": "", **mean}]
        least = min(row["rank"] for row in rows)
        about = {"model": subject.experiment.model.name, "run": run, "sites": len(rows), "least_rank": least}
        means.append(about | mean | {"values": values})
    if options.into and options.into.suffix == ".jsonl":
        write(options.into, written(means, ".jsonl"))
    elif options.into:
        write(options.into, table_of(table))
    else:
        print(table_of(table), end="")
    if options.figure:
        from randlora.use.figures import draw

        draw(means, *options.figure)
    return FINISHED


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"randlora {command}", description=description)
    parser.add_argument("run", type=Path, metavar="RUN", help=RUN)
    parser.add_argument("--any-base", action="store_true", help="on other weights than the run's")
    return parser


def check_into(path: Path | None, endings: Sequence[str], option: str = "--into") -> None:
    """Raises SettingsError, before anything is computed, for a file that could not be written."""
    if path is not None and path.suffix not in endings:
        raise SettingsError(f"{option} {path}: name a {' or a '.join(endings)} file")
    if path is not None and not path.parent.is_dir():
        raise SettingsError(f"{option} {path}: there is no folder {path.parent}; make it, or name another")


def _trained(options: argparse.Namespace) -> Trained:
    return Trained.load(options.run, "any" if options.any_base else "same")


def _endings() -> str:
    return "/".join(FILES)


def _prompts(path: Path, column: str) -> list[str]:
    if not path.is_file():
        raise SettingsError(f"--file {path}: there is no such file")
    if path.suffix not in FILES:
        return path.read_text().splitlines()
    return [str(text) for text in HubTable(read_file(path)).column(column)]


def _conversation(trained: Trained, settings: Generation) -> Iterator[str]:
    """An answer to each line of the standard input, all lines before it kept in mind."""
    messages: list[dict[str, str]] = []
    while True:
        messages.append({"role": "user", "content": input("> " if sys.stdin.isatty() else "")})
        (answer,) = generate(trained, [chat_prompt(trained, messages)], settings, special_tokens=False)
        messages.append({"role": "assistant", "content": answer})
        yield answer
