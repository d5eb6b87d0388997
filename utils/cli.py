"""Command lines: parsing into dataclasses, and what every script does around its `main`."""

import ast
import atexit
import dataclasses
import functools
import inspect
import io
import itertools
import multiprocessing
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Container, Mapping
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from utils.allocator import keep_freed_memory
from utils.errors import (
    FULL_DISK,
    UserError,
    describe_os_error,
    first_line,
    is_out_of_memory,
)
from utils.workers import worker_failure

Config = TypeVar("Config")


def parse(
    kind: type[Config],
    description: str,
    default: Config | None = None,
    old_names: Mapping[str, str] | None = None,
    old_values: Mapping[str, Mapping[str, str]] | None = None,
    aliases: Container[str] = (),
    subcommand: str = "",
    recipes: Mapping[str, Mapping[str, Any]] | None = None,
    hidden: Container[str] = (),
) -> Config:
    """The command line as a dataclass.

    Args:
        kind: dataclass; where its fields have a `section` in their metadata, `--help` is divided
            into these sections.
        default: values of what is not given, for a `kind` with sections (None: its defaults).
        old_names: earlier names of fields; they are refused with a message that gives the new name.
        old_values: per field, earlier spellings of values, which are accepted.
        aliases: earlier names that are accepted nevertheless.
        subcommand: the first word of the command line, where a script has several.
        recipes: settings by the name that `--recipe` takes; they are the values of what is not
            given.
        hidden: fields of a `kind` with sections that are no flags of this script.

    Raises:
        UserError: a flag has been renamed, or is hidden, or there is no such recipe.
        SystemExit: the command line is wrong, or asks for help.
    """
    prog = f"{os.path.basename(sys.argv[0])} {subcommand}".strip()
    description = _one_example_per_line(description)
    arguments = sys.argv[2:] if subcommand else sys.argv[1:]
    arguments = _respell(arguments, old_names or {}, old_values or {}, aliases)
    if recipe := _take_recipe(arguments, recipes or {}):
        default = dataclasses.replace(default or kind(), **recipe)
    if not any(field.metadata.get("section") for field in dataclasses.fields(kind)):
        return tyro.cli(kind, prog=prog, description=description, args=arguments)
    for argument in arguments:
        name = argument.partition("=")[0][2:].removeprefix("no-").replace("-", "_")
        if argument.startswith("--") and name in hidden:
            raise UserError(f"{argument.partition('=')[0]} has no effect in {prog}: leave it out")
    kind_in_sections = _in_sections(kind, default, hidden)
    sections = tyro.cli(kind_in_sections, prog=prog, description=description, args=arguments)
    values = {k: v for section in vars(sections).values() for k, v in vars(section).items()}
    return kind(**values) if default is None else dataclasses.replace(default, **values)


def _take_recipe(
    arguments: list[str], recipes: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Any]:
    """The settings of the recipe that a command line names; its two words are taken out of it.

    It is not a setting itself: it changes the defaults that the other flags are read with.
    """
    for position, argument in enumerate(arguments):
        flag, equals, name = argument.partition("=")
        if flag != "--recipe" or not recipes:
            continue
        taken = arguments[position : position + (1 if equals else 2)]
        name = name if equals else "".join(taken[1:])
        if name not in recipes:
            raise UserError(f"--recipe {name}: choose from {', '.join(recipes)}")
        del arguments[position : position + len(taken)]
        return recipes[name]
    return {}


def parse_subcommand(
    commands: Mapping[str, type],
    description: str,
    old_names: Mapping[str, str] | None = None,
    old_values: Mapping[str, Mapping[str, str]] | None = None,
) -> Any:
    """The command line of a script with subcommands, as the dataclass of the one that is given.

    Args:
        commands: the dataclass of each subcommand; its docstring is the subcommand's help.
        old_names, old_values: see `parse`; they hold for all subcommands.

    Raises:
        UserError: a flag has been renamed.
        SystemExit: the command line is wrong, or asks for help.
    """
    arguments = _respell(sys.argv[1:], old_names or {}, old_values or {}, ())
    return tyro.extras.subcommand_cli_from_dict(
        dict(commands), description=_one_example_per_line(description), args=arguments
    )


def _one_example_per_line(description: str) -> str:
    """The description with its examples indented: tyro joins the lines that are not."""
    return re.sub(r"^(?=python |torchrun )", "    ", description, flags=re.MULTILINE)


def _respell(
    arguments: list[str],
    old_names: Mapping[str, str],
    old_values: Mapping[str, Mapping[str, str]],
    aliases: Container[str],
) -> list[str]:
    """The command line with current names and values."""
    respelled, spellings = [], {}
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            name = flag[2:].removeprefix("no-").replace("-", "_")
            new = old_names.get(name, name)
            spellings = old_values.get(new, {})
            if new != name and name not in aliases:
                raise UserError(f"{flag} is now called --{new.replace('_', '-')}")
            flag = flag if new == name else f"--{new.replace('_', '-')}"
            argument = flag + equals + spellings.get(value, value)
        else:
            argument = spellings.get(argument, argument)
        respelled.append(argument)
    return respelled


def _in_sections(kind: type, default: Any, hidden: Container[str]) -> type:
    """A dataclass of dataclasses, one per section, with the same flags as `kind` but the hidden.

    tyro shows nested dataclasses as groups of `--help`.
    """
    hints, texts = get_type_hints(kind, include_extras=True), field_docs(kind)
    sections: dict[str, list[tuple[str, Any, Any]]] = {}
    section = ""
    for field in dataclasses.fields(kind):
        section = field.metadata.get("section") or section
        if field.name in hidden:
            continue
        value = field.default if default is None else getattr(default, field.name)
        help_text = tyro.conf.arg(help=" ".join(texts[field.name].split()))
        typed = Annotated[hints[field.name], help_text]
        sections.setdefault(section, []).append(
            (field.name, typed, dataclasses.field(default=value))
        )
    groups = []
    for title, fields in sections.items():
        group = dataclasses.make_dataclass(title, fields, frozen=True)
        group.__doc__ = ""
        name = title.lower().replace(" ", "_")
        typed = Annotated[group, tyro.conf.OmitArgPrefixes]
        groups.append((name, typed, dataclasses.field(default_factory=group)))
    return dataclasses.make_dataclass(kind.__name__, groups)


def field_docs(kind: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass, those of its base classes included."""
    texts = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[field.target.id] = text.value.value
    return texts


def cli_main(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a script's `main`: freed memory is kept, a user's mistake is one line and exit code 2.

    Running out of memory and a full disk are reported the same way, because a traceback does not
    help there. Any other error is a bug of this project and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        for stream in (sys.stdout, sys.stderr):
            # A console's encoding may lack letters of a class or a file name, on Windows above all.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        keep_freed_memory()
        atexit.register(end_workers)
        try:
            main()
        except UserError as error:
            sys.exit(_fail(str(error)))
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # the reader of the output, `head` for example, has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except OSError as error:
            if error.errno is None or (error.filename is None and error.errno not in FULL_DISK):
                raise  # not about a file: a bug of this project
            sys.exit(_fail(describe_os_error(error)))
        except (MemoryError, RuntimeError) as error:
            if reason := worker_failure():
                sys.exit(_fail(reason))
            if not is_out_of_memory(error):
                raise
            remedy = "lower batch_size, image_size or n_frames"
            sys.exit(_fail(f"memory is short: {first_line(error)} ({remedy})"))

    return wrapped


def end_workers() -> None:
    """Kill the loaders' workers that still run when the program ends after an error.

    They survive the one SIGTERM that Python sends them then (utils/workers.py), and Python would
    wait for them for ever.
    """
    workers = multiprocessing.active_children()
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise an error
    for worker in workers:
        worker.kill()


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
