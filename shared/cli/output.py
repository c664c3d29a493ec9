"""What a command says: tables for people, JSON for programs, errors in one line with a remedy."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar

import grpc
import typer
from google.protobuf import json_format
from google.protobuf.message import Message
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shared import errors
from shared.grpc_status import from_rpc_error
from shared.importing.problems import ImportRefused

EXIT_OK = 0
EXIT_PROBLEMS = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
PLAIN_WIDTH = 140
EXIT_CODES = (
    "Exit codes: 0 all is well; 1 done, with problems (rejected rows, a failed check or run); "
    "2 usage, a mapping, a file or a setting is wrong; 3 a service or the database cannot be reached."
)
P = ParamSpec("P")
R = TypeVar("R")


def console(*, stderr: bool = False) -> Console:
    """Returns a console for the present stdout or stderr: no colours and no control characters off a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        return Console(file=stream)
    return Console(file=stream, width=PLAIN_WIDTH, no_color=True, force_terminal=False, highlight=False)


def say(text: str) -> None:
    """Prints a line for people, on stderr: stdout is for results."""
    console(stderr=True).print(escape(text), soft_wrap=True, highlight=False)


def show_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, note: str = ""
) -> None:
    """Prints a table; columns whose name starts with # are set right."""
    table = Table()
    for column in columns:
        table.add_column(
            escape(column.lstrip("#")), justify="right" if column.startswith("#") else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(escape("" if cell is None else str(cell)) for cell in row))
    show_titled(table, title, note)


def show_titled(table: Table, title: str, note: str = "") -> None:
    """Prints a table between its title and a note, each on a line of its own."""
    out = console()
    # Not the table's own title: that one is folded to the table's width.
    out.print(f"\n[bold]{escape(title)}[/]", soft_wrap=True, highlight=False)
    out.print(table)
    if note:
        out.print(escape(note), soft_wrap=True, highlight=False)


def show_json(value: Any) -> None:
    """Prints a value, or a message of the contract, as one JSON document."""
    if isinstance(value, Message):
        value = message_dict(value)
    print(json.dumps(value, ensure_ascii=False, indent=2))


def message_dict(message: Message) -> dict[str, Any]:
    """Returns a message of the contract as plain values, with the names of the proto files.

    A field that is zero or empty is there all the same: a program need not know the defaults.
    """
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def exit_code_of(error: BaseException) -> int:
    """Returns the documented exit code of a failure."""
    if isinstance(error, (errors.Unavailable, errors.DeadlineExceeded)):
        return EXIT_UNREACHABLE
    if isinstance(error, (ImportRefused, errors.InvalidInput, errors.NotFound)):
        return EXIT_USAGE
    if isinstance(error, errors.FailedPrecondition) and error.reason in _SET_UP_REASONS:
        return EXIT_USAGE
    return EXIT_PROBLEMS


_SET_UP_REASONS = frozenset(
    {
        "KEY_MISSING",
        "DATABASE_URL_MISSING",
        "DATABASE_NOT_STARTED",
        "PORT_TAKEN",
        "ALREADY_UP",
        "HOME_UNUSABLE",
    }
)


def fail(error: errors.ShopkeeperError, *, as_json: bool) -> NoReturn:
    """Prints an error on stderr and ends the command with its code."""
    if as_json:
        document = {"error": {"reason": error.reason, "message": error.message, "metadata": error.metadata}}
        print(json.dumps(document, ensure_ascii=False), file=sys.stderr)
    else:
        console(stderr=True).print(
            f"[bold red]error[/] {escape(error.message)} [dim]({escape(error.reason)})[/]",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
        if isinstance(error, errors.InvalidInput):
            for violation in error.violations:
                if violation.description in error.message:
                    continue
                say(f"  {violation.field}: {violation.description}")
    raise typer.Exit(exit_code_of(error))


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turns every failure of a command into one clear line and an exit code; never a traceback."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        as_json = bool(kwargs.get("as_json", False))
        try:
            return command(*args, **kwargs)
        except errors.ShopkeeperError as error:
            fail(error, as_json=as_json)
        except grpc.RpcError as rpc_error:
            fail(with_remedy(from_rpc_error(rpc_error)), as_json=as_json)
        except BrokenPipeError:
            raise typer.Exit(EXIT_OK) from None
        except KeyboardInterrupt:
            say("Stopped.")
            raise typer.Exit(130) from None

    return wrapped


def with_remedy(error: errors.ShopkeeperError) -> errors.ShopkeeperError:
    """Returns the error; one of the transport also says what to do."""
    if isinstance(error, errors.Unavailable) and error.reason == "UNAVAILABLE":
        return errors.Unavailable(
            "SERVICE_UNREACHABLE",
            f"The service did not answer ({error.message.splitlines()[0][:160]}). Is the suite up? "
            "`shopkeeper up` starts it, `shopkeeper doctor` says what is wrong.",
        )
    if isinstance(error, errors.DeadlineExceeded):
        return errors.DeadlineExceeded(
            error.reason,
            f"{error.message}. The service is overloaded or stuck; `shopkeeper doctor` looks at it.",
        )
    return error
