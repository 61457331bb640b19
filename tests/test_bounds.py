"""Every setting against its declared type and range: constructions, and real commands.

RANDLORA_CONSTRUCTIONS=10000 RANDLORA_COMMANDS=300 python -m pytest tests/test_bounds.py -n 0 -s is the long run.
"""

from __future__ import annotations

import inspect
import itertools
import math
import os
import random
import runpy
import signal
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import hypothesis
import hypothesis.strategies as st
import torch
from annotated_types import Ge, Gt, Le, Len, Lt, Predicate

import randlora.records.tensorboard
import randlora.records.wandb
import randlora.run  # noqa: F401 -- all that a command imports
from conftest import REPOSITORY
from randlora.bounds import Bounded, declared
from randlora.cli import main
from randlora.config import General, build, settings
from randlora.data.sources import Digits, Source
from randlora.errors import WRONG_SETTINGS, SettingsError
from randlora.experiment import Experiment
from randlora.training import Optimizer

CONSTRUCTIONS = int(os.environ.get("RANDLORA_CONSTRUCTIONS", 500))
COMMANDS = int(os.environ.get("RANDLORA_COMMANDS", 8))
SECONDS = 10  # that a command may take


def classes(base: type) -> list[type]:
    """The dataclasses of settings in the package."""
    below = [cls for direct in base.__subclasses__() for cls in (direct, *classes(direct))]
    return [
        cls
        for cls in dict.fromkeys(below)
        if cls.__module__.startswith("randlora.")
        and "__dataclass_fields__" in vars(cls)
        and not inspect.isabstract(cls)
    ]


def fits(annotation: Any, value: Any) -> bool:
    """Whether a value is what an annotation says: the naive rule, beside the library's that is tested."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return fits(arguments[0], value) and all(_within(limit, value) for limit in arguments[1:])
    if origin in (types.UnionType, typing.Union):
        return any(fits(argument, value) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(fits, arguments, value))
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            fits(arguments[0], key) and fits(arguments[1], item) for key, item in value.items()
        )
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(fits(arguments[0], item) for item in value)
    if annotation is float:
        return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 2**1023)
    return annotation is Any or (
        type(value) is annotation if annotation in (int, str, bool) else isinstance(value, annotation)
    )


def _within(limit: object, value: Any) -> bool:
    match limit:
        case Ge(ge=bound):
            return value >= bound
        case Gt(gt=bound):
            return value > bound
        case Le(le=bound):
            return value <= bound
        case Lt(lt=bound):
            return value < bound
        case Len(min_length=least, max_length=most):
            return least <= len(value) and (most is None or len(value) <= most)
        case Predicate(func=rule):
            return rule(value)
    return True


NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 0.0, 0.5, 1.0, -0.5, 1e300, 10**30, 2**31, 2**63, float("nan"), float("inf")]),
    st.integers(-5, 40),
    st.floats(),
)
ANYTHING = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=5), st.lists(NUMBERS, max_size=3),
    st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2),
    st.sampled_from(["../../x", "a/b", "", "{}", "{} {}", b"x"]),
)  # fmt: skip


def inside(annotation: Any) -> st.SearchStrategy[Any]:
    """Values that an annotation allows."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        low = next((limit.ge for limit in arguments[1:] if isinstance(limit, Ge)), None)
        kind = arguments[0]
        if kind is int:
            return st.integers(low, 300).filter(lambda value: fits(annotation, value))
        if kind is float:
            return st.floats(0, 8).filter(lambda value: fits(annotation, value))
        if typing.get_origin(kind) is Sequence:
            length = next((limit for limit in arguments[1:] if isinstance(limit, Len)), Len(0))
            item = inside(typing.get_args(kind)[0])
            return st.lists(item, min_size=length.min_length, max_size=length.max_length or 3)
        return st.one_of(st.sampled_from(["a", "a {}"]), st.text(max_size=9)).filter(
            lambda text: fits(annotation, text)
        )
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*(inside(argument) for argument in arguments if argument is not torch.Tensor))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.tuples(*map(inside, arguments))
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return st.dictionaries(*map(inside, arguments), max_size=2)
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        return st.lists(inside(arguments[0]), max_size=3)
    if annotation is Source:
        return st.just(Digits())
    simple = {int: st.integers(0, 9), float: st.floats(0, 2), bool: st.booleans(), str: st.text(max_size=9)}
    return simple.get(annotation, st.none())


OUTCOMES = dict.fromkeys(("built", "relation", "refused"), 0)


@hypothesis.settings(max_examples=CONSTRUCTIONS, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.data())
def test_what_is_declared_is_what_is_allowed(data: st.DataObject) -> None:
    cls = data.draw(st.sampled_from(classes(Bounded)))
    fields = declared(cls)
    strange = data.draw(st.sets(st.sampled_from(sorted(fields)), max_size=2)) if fields else set()
    values = {name: data.draw(ANYTHING if name in strange else inside(fields[name])) for name in fields}
    wrong = [name for name in fields if not fits(fields[name], values[name])]
    try:
        cls(**values)
    except SettingsError as error:
        said = str(error)
    else:
        said = ""
    OUTCOMES["refused" if said and wrong else "relation" if said else "built"] += 1
    assert "\n" not in said
    assert said or not wrong, f"{cls.__name__} took {', '.join(f'{name}={values[name]!r}' for name in wrong)}"


@hypothesis.settings(max_examples=max(100, CONSTRUCTIONS // 10), deadline=None, derandomize=True, database=None)
@hypothesis.given(st.data())
def test_an_optimiser_takes_what_torch_declares(data: st.DataObject) -> None:
    algorithms = [name for name, cls in vars(torch.optim).items() if inspect.isclass(cls) and name != "Optimizer"]
    algorithm = data.draw(
        st.sampled_from([name for name in algorithms if issubclass(getattr(torch.optim, name), torch.optim.Optimizer)])
    )
    hints = typing.get_type_hints(getattr(torch.optim, algorithm).__init__)
    own = sorted(set(hints) - {"params", "lr", "weight_decay", "return"})
    names = data.draw(st.sets(st.sampled_from(own), max_size=3))
    values = {name: data.draw(st.one_of(inside(hints[name]), ANYTHING)) for name in names}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    wrong = [name for name in names if not fits(hints[name], given[name])]
    try:
        optimizer = Optimizer(algorithm, **values)
        assert not wrong
        optimizer.over([{"params": [torch.nn.Parameter(torch.ones(2, 2))], "lr": 1e-3, "weight_decay": 0.0}])
    except SettingsError:
        pass


def test_the_page_of_settings_is_what_is_declared() -> None:
    page = (REPOSITORY / "docs" / "settings.md").read_text()
    script = runpy.run_path(str(REPOSITORY / "scripts" / "settings.py"))
    assert script["page"]() == page, "python scripts/settings.py > docs/settings.md"


# Values as they stand on a command line, and as they arrive.
WRITTEN: dict[str, Any] = {
    "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "-1": -1, "0": 0, "-0.5": -0.5, "1.5": 1.5, "true": True,
    "null": None, "text": "text", "[]": [], "[1,true]": [1, True], "{}": {}, "{a:3}": {"a": 3}, 
    "1000000000000": 10**12,
    "100000000000000000000000000000": 10**29, "'1'": "1", "''": "", "../../x": "../../x", "a/b": "a/b",
    "[nan]": [math.nan],
    "1e308": 1e308, "..": "..", "[a,[b]]": ["a", ["b"]],
}  # fmt: skip
# What no range of one setting says.
RELATIONS = [
    tuple(line.split())
    for line in """
    trainer.micro_batch_size=256
    trainer.max_steps=1000000000
    trainer.epochs=1e300
    trainer.epochs=1e9
    trainer.max_steps=3 trainer.warmup=4
    trainer.select=best
    tags=['${oc.env:HOME}']
    tags=['${oc.decode:${oc.env:HOME}}']
    method.alpha=${oc.env:HOME}
    logger={a:3}
    logger=3
    ~method
    ~task
    ~model
    ~trainer
    ~optimizer
    +foo=1
    ~seed
    shots=3 fraction=0.5
    task.templates=[a]
    task.templates=['{}{}']
    task.prompts=ensemble
    trainer.workers=100000
    method=lora method.rank=1000000000
    method=nola method.num_bases=100000000
    method.rank=1000000000
    method=vera method.rank=1000000000
    method=randlora method.num_bases=1000000000
    optimizer.betas=[nan,0.9]
    optimizer.betas=[true,0.9]
    optimizer.betas=0.9
    +optimizer.eps=inf
    seed=9223372036854775808
    task.name=../../x
    model.name=/tmp/x
    trainer=3
    method=[]
    task.source.test=100000
    task.validation_size=-1
    run_root=3
    task.source=3
    model.targets=3
    """.strip().splitlines()
]


def commands(count: int) -> list[tuple[str, ...]]:
    """Command lines with one setting out of its bounds each, and those of RELATIONS, always the same."""
    draw = random.Random(0)
    wrong = []
    for method in ("randlora", "lora", "dora", "edora", "full", "loramini", "lorta", "melora", "mora", "nola", "vera"):
        config = settings(f"method={method}")
        parts: dict[str, Any] = {
            "": General,
            **{f"{part}.": type(build(config[part])) for part in ("method", "model", "task", "trainer")},
        }
        for prefix, cls in parts.items():
            if prefix in ("", "model.", "task.", "trainer.") and method != "randlora":
                continue
            for (name, annotation), (text, value) in itertools.product(declared(cls).items(), WRITTEN.items()):
                # What is no text where a text is due may be another setting of the group to Hydra.
                if not fits(annotation, value) and annotation is not Source:
                    wrong.append((f"method={method}", f"{prefix}{name}={text}"))
    first = RELATIONS if count > len(RELATIONS) else draw.sample(RELATIONS, count // 2)
    return [*first, *draw.sample(wrong, count - len(first))]


def ended(line: Sequence[str], folder: Path) -> tuple[int | None, str]:
    """The exit code of ``randlora LINE`` in a process forked from this one, None after SECONDS; and what it said."""
    said = folder / "said"
    child = os.fork()
    if not child:
        try:
            signal.alarm(SECONDS)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            with said.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            os.chdir(folder)
            sys.argv = ["randlora", "run_root=inner/runs", *line]
            code = main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    return (None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)), said.read_text()


def test_a_wrong_command_is_a_sentence(tmp_path: Path) -> None:
    # Loads torch's compiler, open_clip and accelerate: once here, and not in every process.
    Optimizer().check(0.0)
    Experiment.from_config(settings()).model.meta_model()
    Experiment.from_config(settings()).trainer.accelerator()
    bad = []
    for line in commands(COMMANDS):
        code, said = ended(line, tmp_path)
        errors = [text for text in said.splitlines() if text.startswith("error: ")]
        left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "said"]
        if code != WRONG_SETTINGS or len(said.strip().splitlines()) != 1 or not errors or left:
            bad.append(f"{' '.join(line)}: exit code {code}, said {said[-300:]!r}, left {left[:2]}")
        for path in left:
            path.unlink()
    print(f"\n{COMMANDS} commands, {len(bad)} wrong; constructions {OUTCOMES}")
    assert not bad, "\n".join(bad)
