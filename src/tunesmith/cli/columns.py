"""`--columns FIELD=COLUMN`: which column of a file is which field, mapped by hand."""

from typing import Annotated

import typer

from tunesmith.cli.terminal import USAGE, CommandError

ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="FIELD=COLUMN",
        help="Map a column by hand: --columns instruction=question. Others are then ignored.",
    ),
]


def columns_of(texts: list[str] | None) -> dict[str, str] | None:
    """None where nothing is mapped. Raises CommandError."""
    found: dict[str, str] = {}
    for text in texts or ():
        field, equals, column = text.partition("=")
        if not equals or not column or not field.isidentifier():
            raise CommandError(f"--columns {text!r} has to be FIELD=COLUMN", code=USAGE)
        if field in found:
            raise CommandError(f"--columns maps {field} twice", code=USAGE)
        found[field] = column
    return found or None
