"""The small HTML table by which results and stages show themselves in a notebook. Draws no
figures."""

from collections.abc import Mapping
from html import escape


def card(title: str, rows: Mapping[str, object]) -> str:
    """A titled two-column table; everything is escaped, colours come from the notebook's theme."""
    cells = "".join(
        f'<tr><th scope="row" style="text-align:left;padding-right:1em">{escape(name)}</th>'
        f'<td style="text-align:left">{escape(str(value))}</td></tr>'
        for name, value in rows.items()
    )
    return (
        f'<table><caption style="text-align:left;font-weight:bold">{escape(title)}</caption>'
        f"<tbody>{cells}</tbody></table>"
    )
