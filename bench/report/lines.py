"""Lines and tables on a terminal or in a log: any text appears as it is, whole, in any encoding and width."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_line(console: Console, text: str, style: str = "", *, indent: int = 0, before: int = 0) -> None:
    """Prints text as it is: brackets in it are not markup, and it is never cut, only wrapped."""
    from rich.padding import Padding
    from rich.text import Text

    shown = encodable(text, console)
    console.print(Padding(Text(shown, style=style, overflow="fold"), (before, 0, 0, indent), expand=False))


def encodable(text: str, console: Console) -> str:
    """A log in ASCII gets a question mark for each letter it cannot write, never an exception."""
    try:
        return text.encode(console.encoding, "replace").decode(console.encoding)
    except LookupError:
        return text


def new_table(title: str, console: Console, *columns: tuple[str, bool]) -> Table:
    """A table; a column is its header and whether its cells are numbers, which are not wrapped.

    Below 80 columns even numbers wrap: a cell is never cut.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(encodable(title, console), style="bold") if title else None,
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
    )
    for header, numeric in columns:
        table.add_column(
            header,
            justify="right" if numeric else "left",
            no_wrap=numeric and console.width >= 80,
            overflow="fold",
        )
    return table
