"""The application: its commands, and the one place where errors become messages and exit codes."""

import functools
import os
import signal
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from actsparse import __version__
from actsparse.cli.address_space import check_address_space
from actsparse.cli.output import Output, printable
from actsparse.errors import ActsparseError, is_out_of_memory, reason_of
from actsparse.store.provenance import again

INTERRUPTED = 130
LARGEST_CONFIG = 1 << 20
COMMANDS = ("profile", "threshold", "evaluate", "report", "run", "methods", "models", "doctor")


class _Commands(TyperGroup):
    """The commands; what the parser says about words of a stranger cannot drive a terminal."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _printable_messages():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _printable_messages():
            return super().invoke(ctx)


@contextmanager
def _printable_messages() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Typer does not export the class that all errors of the parser share; they alone have a message
        said = getattr(error, "message", None)
        if isinstance(said, str) and not isinstance(error, ActsparseError):
            error.message = printable(said)  # pyright: ignore[reportAttributeAccessIssue]
        raise


app = typer.Typer(
    name="actsparse",
    cls=_Commands,
    help="Study and exploit activation sparsity in large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"actsparse {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML file with defaults: a table a command, option names as keys.")
    ] = None,
) -> None:
    """Study and exploit activation sparsity in large language models."""
    del version
    if config is not None:
        context.default_map = read_config(config, _parameters(context))


def _parameters(context: typer.Context) -> dict[str, dict[str, str]]:
    """The parameter behind each long option of each command: {"profile": {"limit": "limit", ...}}."""
    commands = context.command.commands  # pyright: ignore[reportAttributeAccessIssue]
    return {
        name: {
            option.removeprefix("--").replace("-", "_"): parameter.name
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
            if option.startswith("--")
        }
        for name, command in commands.items()
    }


def read_config(path: Path, parameters: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Defaults of commands from a TOML file: a table a command, long option names as keys.

    Raises ActsparseError where the file cannot be read, or names a command or option that does not exist.
    """
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ActsparseError(
                f"{path} holds {path.stat().st_size:,} bytes, more than options need",
                "check the path given with --config",
            )
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ActsparseError(f"{path} cannot be read: {error}", "check the path given with --config") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ActsparseError(
            f"{path} is not TOML: {error}", "write a table such as [profile], and under it limit = 8"
        ) from None
    for name, table in tables.items():
        if name not in parameters or not isinstance(table, dict):
            raise ActsparseError(f"{path}: '{name}' is not a command", f"use tables named {', '.join(COMMANDS)}")
        for key in table:
            if key.replace("-", "_") not in parameters[name]:
                near = get_close_matches(key.replace("-", "_"), parameters[name], n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"see actsparse {name} --help"
                raise ActsparseError(f"{path}: {name} has no option '{key}'", hint)
    return {
        name: {parameters[name][key.replace("-", "_")]: value for key, value in table.items()}
        for name, table in tables.items()
    }


def main(argv: list[str]) -> int:
    """Run one command line; the exit code. Every message to a person is printed here or by `Output`."""
    debug = "--debug" in argv
    output = Output(debug=debug)
    try:
        _register()
        result = app(args=argv, prog_name="actsparse", standalone_mode=True)
        return int(result or 0)
    except SystemExit as stop:
        return _exit_code(stop)
    except Exception as error:
        if debug:
            output.traceback()
        known = error if isinstance(error, ActsparseError) else _unforeseen(error)
        output.error(known)
        return known.exit_code


def _exit_code(stop: SystemExit) -> int:
    """The code of a parser or help page that ends the process; one whose reader has left (`| head`) has not failed."""
    if isinstance(stop.__context__, BrokenPipeError):
        # what was being said: a help page, or to a closed stderr an error of the parser, which has a code of its own
        return getattr(stop.__context__.__context__, "exit_code", 0)
    return stop.code if isinstance(stop.code, int) else int(bool(stop.code))


def _unforeseen(error: Exception) -> ActsparseError:
    """The message for an exception that no part of the project turned into one."""
    if is_out_of_memory(error):
        return ActsparseError(
            "out of memory; what was written so far is kept",
            "give a smaller --batch-size or --limit, or --dtype bfloat16, and start the same command again",
        )
    if isinstance(error, OSError):
        return ActsparseError(f"the system refused: {error}", "check the path and the disk; --debug shows where")
    return ActsparseError(
        f"a fault of actsparse itself: {type(error).__name__}: {reason_of(error)}",
        "start it again with --debug, and report what it prints; what was written so far is kept",
    )


def interruptible(command: Callable[..., None], name: str) -> Callable[..., None]:
    """The command with Ctrl-C and SIGTERM turned into exit code 130 and the line that resumes it."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            with _stoppable():
                check_address_space(name, Output())
                command(*args, **kwargs)
                sys.stdout.flush()
        except KeyboardInterrupt:
            line = again(["actsparse", *sys.argv[1:]])
            Output().interrupted(f"interrupted; what was written so far is kept. Resume with:\n  {line}")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # the reader has left (`| head`), and the work is done: keep the interpreter from complaining at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit from None

    return guarded


@contextmanager
def _stoppable() -> Iterator[None]:
    """While the block runs, SIGTERM stops it as Ctrl-C does: what is finished is kept, what is half written goes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@functools.cache
def _register() -> None:
    for name in COMMANDS:
        module = import_module(f"actsparse.cli.{name}")
        app.command(name, help=module.HELP, epilog=module.EPILOG)(interruptible(module.command, name))


def _open_streams() -> None:
    """Streams that this process was started without (`>&-`) lead nowhere: else the next file would take their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)
        setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def entry() -> None:
    """The console script."""
    _open_streams()
    sys.exit(main(sys.argv[1:]))
