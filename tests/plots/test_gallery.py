"""The gallery shows every figure that there is."""

import re
from pathlib import Path

from flashmoe_lab import plots

DOCS = Path(__file__).parents[2] / "docs"


def test_every_figure_is_in_the_gallery_with_its_picture() -> None:
    page = (DOCS / "gallery.md").read_text()
    shown = set(re.findall(r"^`(\w+)\(", page, re.MULTILINE))
    assert shown == set(plots.__all__) - {"FIGURES", "Plot", "draw_all"}
    pictures = set(re.findall(r"\]\(images/gallery/(\w+\.png)\)", page))
    assert pictures == {file.name for file in (DOCS / "images" / "gallery").iterdir()}
