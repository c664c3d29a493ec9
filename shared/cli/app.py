"""The command `shopkeeper`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import typer

from shared.cli.commands import models, operation, shop
from shared.cli.output import EXIT_CODES
from shared.errors import ShopkeeperError

# In the order of --help: as a newcomer meets them.
COMMANDS: dict[str, Callable[..., None]] = {
    "up": operation.up,
    "down": operation.down,
    "import": shop.import_,
    "mappings": shop.mappings,
    "simulate": shop.simulate,
    "train": models.train,
    "watch": models.watch,
    "models": models.models,
    "promote": models.promote,
    "rollback": models.rollback,
    "recommend": shop.recommend,
    "explain": shop.explain,
    "profile": shop.profile,
    "forget": shop.forget,
    "receipt": shop.receipt,
    "verify-receipt": shop.verify_receipt,
    "unknown-items": shop.unknown_items,
    "metrics": shop.metrics,
    "doctor": operation.doctor,
    "certs": operation.certs,
    "prepare": operation.prepare,
    "demo": operation.demo,
}

app = typer.Typer(
    name="shopkeeper",
    help="Shopkeeper: a suite of gRPC services that remembers an online shop's customers and knows what to show them.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for name, command in COMMANDS.items():
    app.command(name, epilog=EXIT_CODES)(command)


def main() -> None:
    """Runs the command line; the exit codes are those in --help."""
    # A library of the embedded PostgreSQL warns about a variable that it does not need.
    warnings.filterwarnings("ignore", module="platformdirs")
    try:
        app()
    except ShopkeeperError as error:  # A setting that is read before a command begins.
        print(f"error {error.message}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
