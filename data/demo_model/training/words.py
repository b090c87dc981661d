"""The word lists of the generators, and the small words made from them: names, files, paths.

The lists are in words.json, written for this model. One draw in six makes a word up instead of
taking it from a list, so that copying a word is learnt and not only the lists.
"""

import json
from pathlib import Path

from .draw import Draw

WORDS: dict[str, list] = json.loads((Path(__file__).parent / "words.json").read_text("utf-8"))

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September"]
MONTHS += ["October", "November", "December"]

_SYLLABLES = [
    "ba", "bel", "bri", "cal", "cor", "da", "den", "dor", "el", "fa", "fen", "gar", "gil", "ha",
    "hol", "in", "jo", "kal", "ker", "la", "lim", "lo", "mar", "mel", "mi", "mor", "na", "nel",
    "nim", "no", "or", "pa", "pel", "pim", "qua", "ral", "ri", "ron", "sa", "sel", "sti", "ta",
    "tem", "tor", "ul", "va", "vel", "vin", "wen", "xa", "yor", "za", "zim",
]  # fmt: skip
_SUFFIXES = ["txt", "md", "py", "json", "csv", "png", "jpg", "pdf", "log", "html"]
_MADE_UP = 1 / 6


def made_up(draw: Draw) -> str:
    """A word that no list has, of two or three syllables."""
    return "".join(draw.choice(_SYLLABLES) for _ in range(draw.number(2, 3)))


def first_name(draw: Draw) -> str:
    """A person's first name."""
    if draw.chance(_MADE_UP):
        return made_up(draw).capitalize()
    return draw.choice(WORDS["girls"] if draw.chance(0.5) else WORDS["boys"])


def surname(draw: Draw) -> str:
    """A family name."""
    return made_up(draw).capitalize() if draw.chance(_MADE_UP) else draw.choice(WORDS["surnames"])


def full_name(draw: Draw) -> str:
    """First name and family name."""
    return f"{first_name(draw)} {surname(draw)}"


def city(draw: Draw) -> str:
    """A city, now and then a capital."""
    if draw.chance(_MADE_UP / 2):
        return made_up(draw).capitalize()
    return draw.choice(WORDS["cities"]) if draw.chance(0.7) else draw.choice(WORDS["capitals"])[1]


def noun(draw: Draw) -> str:
    """A plain noun for files, tags and texts."""
    return made_up(draw) if draw.chance(_MADE_UP) else draw.choice(WORDS["nouns"])


def thing(draw: Draw) -> str:
    """Something one can buy or own."""
    return draw.choice(WORDS[draw.pick("objects", "objects", "fruits")])


def code(draw: Draw, length: int = 5) -> str:
    """A code of letters and digits that look different from one another."""
    return "".join(draw.choice("ABCDEFGHJKLMNPQRSTUVWXYZ23456789") for _ in range(length))


def file_name(draw: Draw) -> str:
    """A file name such as `river_12.txt`."""
    stem = noun(draw) + draw.pick("", "", f"_{draw.number(1, 99)}", f"-{noun(draw)}")
    return f"{stem}.{draw.choice(_SUFFIXES)}"


def folder(draw: Draw) -> str:
    """A folder's path."""
    home = f"/home/{first_name(draw).lower()}"
    return draw.pick(home, "/tmp", "/data", "./src", "docs", "/var/log", f"{home}/{noun(draw)}")


def article(word: str) -> str:
    """`word` with the indefinite article before it."""
    return f"{'an' if word[0] in 'aeiouAEIOU' else 'a'} {word}"


def plural(word: str) -> str:
    """The regular plural, with the endings that the lists need."""
    irregular = {
        "mouse": "mice", "goose": "geese", "wolf": "wolves", "sheep": "sheep", "deer": "deer",
        "ox": "oxen", "knife": "knives", "scarf": "scarves", "shelf": "shelves", "puppy": "puppies",
        "salmon": "salmon", "trout": "trout", "bison": "bison", "loaf": "loaves",
    }  # fmt: skip
    if word in irregular:
        return irregular[word]
    if word.endswith(("s", "x", "ch", "sh", "potato", "tomato", "mango", "buffalo")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def joined(items: list[str], last: str = "and") -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def sentence(text: str) -> str:
    """`text` with its first letter as a capital."""
    return text[0].upper() + text[1:]
