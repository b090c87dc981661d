"""The notebook's small table."""

from xml.etree import ElementTree

from flashmoe_lab.cards import card


def test_title_and_rows_in_order():
    tree = ElementTree.fromstring(card("Layer 3", {"experts": 512, "file": "layer_03"}))
    assert [row.text for row in tree.iter("caption")] == ["Layer 3"]
    assert [cell.text for cell in tree.iter("th")] == ["experts", "file"]
    assert [cell.text for cell in tree.iter("td")] == ["512", "layer_03"]


def test_everything_is_escaped():
    html = card("<b>", {"<script>": "<img src='x'>&"})
    assert "<script>" not in html and "<img" not in html and "<b>" not in html
    (cell,) = ElementTree.fromstring(html).iter("td")
    assert cell.text == "<img src='x'>&"


def test_no_rows():
    assert "<tbody></tbody>" in card("empty", {})


def test_no_colours():
    """They come from the notebook's theme, light or dark."""
    assert "color" not in card("a", {"b": 1})
