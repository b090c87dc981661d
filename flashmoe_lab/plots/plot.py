"""Plot: a figure with the data that it draws; it shows itself in a notebook and saves itself.

Matplotlib's objects only, no pyplot: figures may be made in any thread, and none is shown twice.
"""

from base64 import b64encode
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
_DPI = 192  # crisp on a dense screen; shown at half the size


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One figure.

    Attributes:
        figure: to change it further.
        data: exactly what is drawn, with units in the columns' names.
        title: what was measured.
    """

    figure: Figure
    data: pd.DataFrame
    title: str

    def save(self, path: str | Path, dpi: int = _DPI) -> Path:
        """Write it as .png, .svg or .pdf, by the name's ending."""
        path = Path(path)
        if path.suffix not in FORMATS:
            raise ValueError(f"{path}: the name must end in {', '.join(FORMATS)}")
        # A date or a name by chance would make each drawing of the same data another file.
        dates = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        with rc_context({"svg.hashsalt": "flashmoe_lab"}):
            self.figure.savefig(path, dpi=dpi, metadata=dates[path.suffix])
        return path

    def png(self, dpi: int = _DPI) -> bytes:
        """The picture's bytes."""
        buffer = BytesIO()
        self.figure.savefig(buffer, format="png", dpi=dpi)
        return buffer.getvalue()

    def html(self) -> str:
        """An <img> that holds the picture, for a card that is made of HTML."""
        data, width = b64encode(self.png(144)).decode(), int(self.figure.get_size_inches()[0] * 100)
        return (
            f'<img alt="{escape(self.title)}" width="{width}" style="max-width:100%;display:block;'
            f'margin-top:8px" src="data:image/png;base64,{data}">'
        )

    def __repr__(self) -> str:
        return f"<Plot: {self.title}; {len(self.data)} rows of data>"

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        width, height = self.figure.get_size_inches() * 100
        size = {"width": int(width), "height": int(height)}
        return {"image/png": self.png(), "text/plain": repr(self)}, {"image/png": size}
