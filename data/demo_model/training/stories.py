"""Short stories from a grammar, in which every name and pronoun stays with its bearer.

A story has a hero and a friend of different kinds, a place, a thing and a plot. A plot (plots.json)
is a list of beats with several wordings; `{a|b}` is a choice and `[slot]` a name or pronoun that is
fixed once for the story. Long stories chain plots with the same two.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chat_format import Chat, assistant, to_json, user
from .draw import Draw
from .words import WORDS, article, made_up, plural, sentence

PLOTS: dict[str, Any] = json.loads((Path(__file__).parent / "plots.json").read_text("utf-8"))

_CHOICE = re.compile(r"\{([^{}]*)\}")
_SLOT = re.compile(r"\[([^\[\]]+)\]")
_PRONOUNS = {"m": ("he", "him", "his"), "f": ("she", "her", "her")}


@dataclass(frozen=True, slots=True)
class Person:
    """A hero or friend."""

    name: str
    kind: str
    gender: str
    trait: str


@dataclass(frozen=True, slots=True)
class Story:
    """A story and what it is about."""

    title: str
    text: str
    hero: Person
    friend: Person
    theme: str
    lesson: str
    thing: str


def make_story(draw: Draw, episodes: int = 1) -> Story:
    """A story of one or more plots."""
    hero, friend = _cast(draw)
    place = draw.choice(list(PLOTS["places"]))
    names = draw.sample(list(PLOTS["plots"]), episodes)
    names.sort(key=lambda name: name != "friend")  # who meets for the first time does so first
    plots = [PLOTS["plots"][name] for name in names]
    paragraphs: list[str] = []
    title = theme = lesson = thing = ""
    for number, plot in enumerate(plots):
        slots = _slots(draw, hero, friend, place)
        head = draw.choice(PLOTS["bridges" if number else "openings"])
        beats = [head] + [draw.choice(wordings) for wordings in plot["beats"]]
        lesson = draw.choice(plot["lessons"])
        if number == len(plots) - 1:
            beats.append(draw.choice(PLOTS["closings"]).replace("[lesson]", lesson))
        paragraphs += _paragraphs(draw, [_fill(draw, beat, slots) for beat in beats if beat])
        if not number:
            title, theme, thing = (
                _fill(draw, draw.choice(plot["titles"]), slots),
                plot["theme"],
                slots["thing"],
            )
    return Story(title, "\n\n".join(paragraphs), hero, friend, theme, lesson, thing)


def _cast(draw: Draw) -> tuple[Person, Person]:
    hero = _person(draw)
    friend = _person(draw)
    while friend.kind == hero.kind or friend.name == hero.name or friend.kind in ("girl", "boy"):
        friend = _person(draw)
    return hero, friend


def _person(draw: Draw) -> Person:
    gender = draw.pick("m", "f")
    child = {"m": "boy", "f": "girl"}[gender]
    kind = child if draw.chance(0.4) else draw.choice(list(PLOTS["kinds"]))
    name = draw.choice(WORDS["boys" if gender == "m" else "girls"])
    if draw.chance(0.08):
        name = made_up(draw).capitalize()
    return Person(name, kind, gender, draw.choice(PLOTS["traits"]))


def _slots(draw: Draw, hero: Person, friend: Person, place: str) -> dict[str, str]:
    """The words of one episode; a capital slot name gives the word with a capital."""
    first, second = draw.sample(PLOTS["places"][place], 2)
    thing = draw.choice(list(PLOTS["things"]))
    skill, act = draw.choice(PLOTS["skills"])
    fear, aid, truth = draw.choice(PLOTS["fears"])
    elder = draw.choice(PLOTS["elders"])[0]
    he, him, his = _PRONOUNS[hero.gender]
    fhe, fhim, fhis = _PRONOUNS[friend.gender]
    home = PLOTS["kinds"].get(hero.kind, "small house")
    return {
        "hero": hero.name, "kind": hero.kind, "trait": hero.trait, "friend": friend.name,
        "fkind": friend.kind, "ftrait": friend.trait, "he": he, "him": him, "his": his, "fhe": fhe,
        "fhim": fhim, "fhis": fhis, "place": place, "d1": first, "d2": second, "thing": thing,
        "things": plural(thing), "adj": draw.choice(PLOTS["things"][thing]), "home": home,
        "food": draw.choice(PLOTS["foods"]), "weather": draw.choice(PLOTS["weathers"]),
        "size": draw.choice(PLOTS["sizes"]), "skill": skill, "act": act, "fear": fear, "aid": aid,
        "truth": truth, "elder": elder,
    }  # fmt: skip


def _fill(draw: Draw, text: str, slots: dict[str, str]) -> str:
    """Makes the choices and puts the words in; `[a thing]` and `[an adj]` get their article."""
    while found := _CHOICE.search(text):
        chosen = draw.choice(found.group(1).split("|"))
        text = text[: found.start()] + chosen + text[found.end() :]

    def word(found: re.Match[str]) -> str:
        name = found.group(1)
        if name.startswith(("a ", "an ")):
            return article(slots[name.split(" ", 1)[1]])
        return slots[name] if name in slots else sentence(slots[name.lower()])

    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", _SLOT.sub(word, text))


def _paragraphs(draw: Draw, beats: list[str]) -> list[str]:
    paragraphs = []
    while beats:
        count = draw.pick(1, 2, 2, 3)
        paragraphs.append(" ".join(beats[:count]))
        beats = beats[count:]
    return paragraphs


def story_text(draw: Draw) -> str:
    """A story as plain text, at times with its title."""
    story = make_story(draw, draw.pick(1, 1, 1, 2))
    return f"{story.title}\n\n{story.text}" if draw.chance(0.25) else story.text


def story_chat(draw: Draw) -> Chat:
    """A story told on request, questions about a story, or a story continued."""
    share = draw.rng.random()
    if share < 0.65:
        return _told(draw)
    return _questions(draw) if share < 0.9 else _continued(draw)


def _plan(story: Story) -> str:
    hero, friend = story.hero, story.friend
    he = _PRONOUNS[hero.gender][0]
    return (
        f"The hero is {hero.name}, {article(hero.kind)} ({he}). The friend is {friend.name}, "
        f"{article(friend.kind)}. It is about {story.theme}."
    )


def _told(draw: Draw) -> Chat:
    long = draw.chance(0.35)
    story = make_story(draw, draw.pick(2, 2, 3) if long else 1)
    hero, friend = story.hero, story.friend
    about = draw.pick(
        f"{article(hero.kind)} named {hero.name}", f"a {hero.trait} {hero.kind}", story.theme,
        f"{article(hero.kind)} and {article(friend.kind)}", f"{hero.name} and {friend.name}",
        f"{article(hero.kind)} and {story.theme}", f"a {hero.trait} {hero.kind} named {hero.name}",
        f"a {hero.trait} {hero.kind} and a {friend.trait} {friend.kind}",
    )  # fmt: skip
    size = draw.pick("long ", "longer ") if long else draw.pick("", "", "short ")
    ask = draw.pick(
        f"Tell me a {size}story about {about}.", f"Write a {size}story about {about}.",
        f"Can you tell me a {size}bedtime story about {about}?",
        f"I want a {size}story about {about}.",
        f"Tell me a {size}story.", f"Please tell a {size}story.",
    )  # fmt: skip
    ask = re.sub(r"\ba (?=[aeiou])", "an ", ask)
    text = f"**{story.title}**\n\n{story.text}" if draw.chance(0.3) else story.text
    messages = [user(ask), assistant(text, _plan(story))]
    if draw.chance(0.3):
        question, answer = _question(draw, story)
        messages += [user(question), assistant(answer, _plan(story))]
    return Chat(kind="story", messages=messages)


def _question(draw: Draw, story: Story) -> tuple[str, str]:
    hero, friend = story.hero, story.friend
    facts = {"hero": hero.name, "kind": hero.kind, "friend": friend.name}
    return draw.pick(
        ("Who is the story about?", f"It is about {hero.name}, {article(hero.kind)}."),
        (f"Who is {friend.name}?", f"{friend.name} is {article(friend.kind)}."),
        (f"Who is {hero.name}?", f"{hero.name} is {article(hero.kind)}."),
        ("Who is the friend in the story?", f"The friend is {friend.name} the {friend.kind}."),
        (f"Is {hero.name} a he or a she?", f"{hero.name} is a {_PRONOUNS[hero.gender][0]}."),
        ("What is the story about?", f"It is about {story.theme}."),
        ("Give the story a title.", story.title),
        ("Write hero, kind and friend as JSON.", to_json(facts)),
    )


def _questions(draw: Draw) -> Chat:
    story = make_story(draw)
    question, answer = _question(draw, story)
    messages = [user(f"{story.text}\n\n{question}"), assistant(answer, _plan(story))]
    if draw.chance(0.5):
        question, answer = _question(draw, story)
        messages += [user(question), assistant(answer, _plan(story))]
    return Chat(kind="story", messages=messages)


def _continued(draw: Draw) -> Chat:
    story = make_story(draw)
    parts = story.text.split("\n\n")
    half = max(1, len(parts) // 2)
    ask = draw.pick("Continue this story:", "What happens next?", "Write the rest of this story:")
    begun, rest = "\n\n".join(parts[:half]), "\n\n".join(parts[half:]) or "The end."
    return Chat(kind="story", messages=[user(f"{ask}\n\n{begun}"), assistant(rest, _plan(story))])
