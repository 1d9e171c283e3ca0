"""What every command shares: the app, the environment, machine output, errors and exit codes."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from functools import partial
from typing import Any, TextIO

import typer
from rich.console import Console
from typer.core import TyperGroup

from deltatune.marks import ConfigError
from deltatune.terminal import plain

DONE, UNEXPECTED, BAD_INPUT, UNVERIFIED, STOPPED, INTERRUPTED = 0, 1, 2, 3, 4, 130

# Set by the command line only, before torch is imported, and only where the user has not set them.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads sleep: on few cores busy waiting slows everything else down
    "GOMP_SPINCOUNT": "0",  # the same for GNU's OpenMP
    "TOKENIZERS_PARALLELISM": "false",  # no fork warning, and no second pool of threads beside torch's
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
HELP_END = f"Environment, where you have not set it yourself: {' '.join(f'{k}={v}' for k, v in ENVIRONMENT.items())}"
EXIT_CODES = (
    "Exit codes: 0 done, 1 unexpected error, 2 bad input or config, 3 a verification failed, 4 stopped by a guard, "
    "130 / 143 interrupted, with a valid checkpoint once training has begun."
)

LINE = 120  # columns of a table in a file or a pipe
# Standard output while a command must answer with one JSON document; None when people read along.
MACHINE: ContextVar[TextIO | None] = ContextVar("machine", default=None)


def prepare() -> None:
    """Set `ENVIRONMENT` for this process and the ones it starts."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def machine() -> bool:
    """Whether --json was given."""
    return MACHINE.get() is not None


def screen() -> Console:
    """Standard output for people; standard error under --json."""
    width = None if sys.stdout.isatty() else LINE
    return Console(file=sys.stdout, highlight=False, emoji=False, width=width)


def side() -> Console:
    """Standard error: notes and progress."""
    return Console(file=sys.stderr, highlight=False, emoji=False)


def note(text: str) -> None:
    """One line on standard error."""
    side().print(plain(text), markup=False, soft_wrap=True)


def strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: null says there is no number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [strict(item) for item in value]
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def emit(document: Any) -> None:
    """The one JSON document of a command, on standard output."""
    stream = MACHINE.get() or sys.stdout
    stream.write(json.dumps(strict(document), indent=1, allow_nan=False) + "\n")
    stream.flush()


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Whatever else writes to standard output (libraries, processes they start) lands on standard error."""
    real, own = sys.stdout, None
    try:
        descriptor = real.fileno()
        own = os.fdopen(os.dup(descriptor), "w", encoding="utf-8")
        real.flush()
        os.dup2(sys.stderr.fileno(), descriptor)
    except (OSError, ValueError, AttributeError):  # a stream that is no file: only Python's own writes can be moved
        own = None
    token = MACHINE.set(own or real)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        MACHINE.reset(token)
        if own is not None:
            own.flush()
            os.dup2(own.fileno(), descriptor)
            own.close()


def verdict(error: BaseException) -> int:
    """The exit code of an error: its own, 2 for what users can mend, 1 for what they cannot."""
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return BAD_INPUT if isinstance(error, ValueError | OSError) else UNEXPECTED


def report(error: BaseException) -> int:
    """Say what went wrong, as one message or one JSON document, and return the exit code."""
    code = verdict(error)
    message = plain(str(error)) or type(error).__name__
    details: dict[str, Any] = {"kind": type(error).__name__, "exit_code": code}
    if code == UNEXPECTED:
        details["traceback"] = keep_traceback(error)
        message = (
            f"unexpected error: {type(error).__name__}: {message}\nThe full traceback is in {details['traceback']}"
        )
    if isinstance(error, KeyboardInterrupt):
        message = "interrupted before there was anything to save; type the same command again"
    if isinstance(error, ConfigError):
        details["problems"] = [{"where": p.where, "key": list(p.spot), "text": p.text} for p in error.problems]
    if machine():
        emit({"error": {"message": message, **details}})
    else:
        side().print(f"error: {message}", markup=False, soft_wrap=True, style="red")
    return code


def keep_traceback(error: BaseException) -> str:
    """Write the traceback to a file of its own (readable by its owner only) and return the path."""
    handle, path = tempfile.mkstemp(prefix="deltatune-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("".join(traceback.format_exception(error)))
    return path


def once(command: Any, ctx: Any, args: Sequence[str]) -> None:
    """ValueError for an option given twice, of which the last would silently count."""
    try:
        order = command.make_parser(ctx).parse_args(args=list(args))[2]
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return  # a mistyped line: the command itself says so
    single = [p for p in order if p.param_type_name == "option" and not (p.multiple or getattr(p, "is_flag", False))]
    if twice := next((p for p in single if single.count(p) > 1), None):
        raise ValueError(f"{twice.opts[0]} is given twice; keep one")


class Shell(TyperGroup):
    """The root of the commands: one place where errors become messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; ours are the errors that typer does not know."""
        prepare()
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, (typer.Exit, typer.Abort, BrokenPipeError)) or hasattr(error, "format_message"):
                raise
            raise typer.Exit(report(error)) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command of a line; an option that takes one value is an error where it is given twice."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            once(command, command.context_class(command, info_name=name, parent=ctx), rest)
        return name, command, rest

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Under --json even a mistyped option is answered with a document."""
        given = list(sys.argv[1:] if args is None else args)
        run = partial(super().main, given, prog_name, complete_var, windows_expand_args=windows_expand_args, **extra)
        if "--json" not in given or "--help" in given or "-h" in given:
            return run(standalone_mode=standalone_mode)
        with quiet_stdout():
            try:
                code = run(standalone_mode=False)
            except Exception as error:
                if not hasattr(error, "format_message"):
                    raise
                code = BAD_INPUT
                emit({"error": {"message": error.format_message(), "kind": "UsageError", "exit_code": code}})
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else DONE)
        return code


main = typer.Typer(
    cls=Shell,
    help="Fine-tune language models by small, verified changes to a frozen base.",
    epilog=f"{EXIT_CODES} {HELP_END}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
