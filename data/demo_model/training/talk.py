"""Plain conversation: small talk, questions about the model itself, facts, and longer answers.

None of it is part of the evaluation, because many answers are right; it is what a stranger types
first. The texts are in talk.json and words.json.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .chat_format import Chat, Message, assistant, user
from .draw import Draw
from .words import DAYS, MONTHS, WORDS, article, city, first_name, joined, sentence

TALK: dict[str, Any] = json.loads((Path(__file__).parent / "talk.json").read_text("utf-8"))

SYSTEM = (
    "You are a helpful assistant.", "You are the demo model of flashmoe_lab.", "Answer briefly.",
    "You are a friendly helper. Keep answers short.", "Be kind and clear.",
)  # fmt: skip


def _typed(draw: Draw, text: str) -> str:
    """As typed in a hurry now and then: without capital or full stop."""
    if draw.chance(0.1):
        text = text[0].lower() + text[1:]
    return text.rstrip(".?!") if draw.chance(0.12) else text


def _entry(draw: Draw, part: str, thought: str) -> list[Message]:
    asked, replies = draw.choice(TALK[part])
    return [user(_typed(draw, draw.choice(asked))), assistant(draw.choice(replies), thought)]


def about_itself(draw: Draw) -> list[Message]:
    """A question about the model."""
    thought = "The user asks about me. I am the small demo model of flashmoe_lab."
    return _entry(draw, "self", thought)


def small_talk(draw: Draw) -> list[Message]:
    """A greeting, a mood, thanks, a joke."""
    return _entry(draw, "small", "This is small talk. A short friendly reply is enough.")


def fact(draw: Draw) -> list[Message]:
    """A capital, an opposite, a sound, a day, a past tense or a plain fact."""
    question, answer = draw.pick(
        _capital, _capital, _opposite, _sound, _next_in_row, _past, _known, _known, _known
    )(draw)
    return [user(_typed(draw, question)), assistant(answer, "I know this one.")]


def _capital(draw: Draw) -> tuple[str, str]:
    country, town = draw.choice(WORDS["capitals"])
    return draw.pick(
        (f"What is the capital of {country}?", f"The capital of {country} is {town}."),
        (f"Name the capital of {country}.", f"The capital of {country} is {town}."),
        (f"{town} is the capital of which country?", f"{town} is the capital of {country}."),
    )


def _opposite(draw: Draw) -> tuple[str, str]:
    word, other = draw.sample(draw.choice(WORDS["opposites"]), 2)
    ask = draw.pick(f"What is the opposite of {word}?", f'Give me the opposite of "{word}".')
    return ask, f"The opposite of {word} is {other}."


def _sound(draw: Draw) -> tuple[str, str]:
    animal, sound = draw.choice(WORDS["sounds"])
    answer = sentence(f"{article(animal)} {sound}.")
    return f"What sound does {article(animal)} make?", answer


def _next_in_row(draw: Draw) -> tuple[str, str]:
    row, step = draw.pick(DAYS, MONTHS), draw.pick(1, -1)
    place, where = draw.number(0, len(row) - 1), "after" if step == 1 else "before"
    other = row[(place + step) % len(row)]
    return f"What comes {where} {row[place]}?", f"{other} comes {where} {row[place]}."


def _past(draw: Draw) -> tuple[str, str]:
    now, then = draw.choice(WORDS["past"])
    ask = draw.pick(f'What is the past tense of "{now}"?', f'Put "{now}" in the past.')
    return ask, f'The past tense of "{now}" is "{then}".'


def _known(draw: Draw) -> tuple[str, str]:
    question, answer = draw.choice(WORDS["facts"])
    return question, answer


def talk_chat(draw: Draw) -> Chat:
    """One to four turns of small talk, questions about the model and facts."""
    parts: list[Callable[[Draw], list[Message]]] = [
        small_talk,
        small_talk,
        about_itself,
        about_itself,
        fact,
    ]
    messages: list[Message] = []
    for _ in range(draw.pick(1, 1, 1, 1, 2, 2, 3, 4)):
        messages += draw.choice(parts)(draw)
    if draw.chance(0.12):
        name = first_name(draw)
        greeting = [user(draw.pick(f"My name is {name}.", f"I am {name}.", f"Hi, I am {name}."))]
        messages = [
            *greeting,
            assistant(f"Nice to meet you, {name}!", f"The user is {name}."),
            *messages,
        ]
    chat = Chat(kind="talk", messages=messages)
    return chat.with_system(draw.pick(*SYSTEM)) if draw.chance(0.25) else chat


def fact_chat(draw: Draw) -> Chat:
    """One fact."""
    return Chat(kind="fact", messages=fact(draw))


def long_chat(draw: Draw) -> Chat:
    """An answer of many lines or sentences: instructions, a recitation, a letter, a day."""
    make = draw.pick(_how_to, _how_to, _two_how_to, _recitation, _recitation, _letter, _day)
    question, answer, thought = make(draw)
    return Chat(kind="long", messages=[user(question), assistant(answer, thought)])


def _steps(what: str, steps: list[str], tip: str) -> str:
    lines = "\n".join(f"{place}. {step}" for place, step in enumerate(steps, 1))
    return f"To {what}, do this:\n\n{lines}\n\n{tip}"


def _how_to(draw: Draw) -> tuple[str, str, str]:
    what, steps, tip = draw.choice(TALK["howto"])
    ask = draw.pick(
        f"How do I {what}?", f"Explain how to {what}.", f"Tell me step by step how to {what}.",
        f"How can I {what}?", f"Give me instructions: {what}.",
    )  # fmt: skip
    return ask, _steps(what, steps, tip), f"I explain it in {len(steps)} steps."


def _two_how_to(draw: Draw) -> tuple[str, str, str]:
    (one, steps, tip), (two, more, hint) = draw.sample(TALK["howto"], 2)
    ask = draw.pick(
        f"How do I {one}, and how do I {two}?", f"Explain how to {one} and how to {two}."
    )
    answer = f"{_steps(one, steps, tip)}\n\n{_steps(two, more, hint)}"
    return ask, answer, f"Two things: first how to {one}, then how to {two}."


def _recitation(draw: Draw) -> tuple[str, str, str]:
    kind = draw.number(0, 5)
    if kind <= 1:
        low = draw.number(0, 60)
        high = low + draw.number(10, 39)
        up = kind == 0
        row = range(low, high + 1) if up else range(high, low - 1, -1)
        ask = f"Count from {row[0]} to {row[-1]}."
        return ask, ", ".join(map(str, row)), f"I start at {row[0]} and stop at {row[-1]}."
    if kind <= 3:
        factor = draw.number(1, 12)
        lines = "\n".join(f"{place} * {factor} = {place * factor}" for place in range(1, 13))
        ask = draw.pick(
            f"Write the {factor} times table.", f"Show me the multiplication table of {factor}."
        )
        return ask, lines, f"Twelve lines, in steps of {factor}."
    names, row = draw.pick(("days of the week", DAYS), ("months of the year", MONTHS))
    if kind == 4:
        return f"Name the {names}.", joined(row) + ".", f"There are {len(row)}."
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "Say the alphabet.", ", ".join(letters), "There are 26 letters."


def _letter(draw: Draw) -> tuple[str, str, str]:
    to, name, place = first_name(draw), first_name(draw), city(draw)
    food, thing = draw.choice(WORDS["foods"]), draw.choice(WORDS["objects"])
    ask = draw.pick(
        f"Write a letter from {name} to {to} about a trip to {place}.",
        f"Write a letter to {to} about {place}. Sign it {name}.",
    )
    middle = draw.sample([
        f"The streets of {place} are full of people, and there is music on every corner.",
        f"Yesterday I bought {article(thing)} at the market. It will look good in my room.",
        f"The best thing is the food. I had {food} three days in a row!",
        "It rained on the first day, but now the sun is shining.",
        "I walk a lot, and in the evening I am tired but happy.",
        "Tomorrow I want to see the old town and the river.",
        "I met some friendly people who showed me the way.",
        "The room is small, but from the window I can see the hills.",
    ], draw.number(4, 6))  # fmt: skip
    answer = (
        f"Dear {to},\n\nI am in {place} now, and I think of you. {' '.join(middle[:2])}\n\n"
        f"{' '.join(middle[2:])}\n\nI hope that you are well. I will tell you more when I am home, "
        f"{to}.\n\nKind regards,\n{name}"
    )
    return ask, answer, f"The letter goes to {to}, and {name} signs it. The place is {place}."


def _day(draw: Draw) -> tuple[str, str, str]:
    name, he, his = draw.pick(
        (draw.choice(WORDS["girls"]), "she", "her"), (draw.choice(WORDS["boys"]), "he", "his")
    )
    job, food, animal = (draw.choice(WORDS[key]) for key in ("jobs", "foods", "animals"))
    thing, subject = draw.choice(WORDS["objects"]), he.capitalize()
    ask = draw.pick(
        f"Describe a day of {name}, {article(job)}.", f"Write about the day of {name} the {job}."
    )
    topic, drink = draw.pick("the weather", "a book", "music"), draw.pick("tea", "milk", "coffee")
    evening, hour = (
        draw.pick("reads a book", "cooks soup", "hears music"),
        draw.pick("six", "seven"),
    )
    parts = [
        f"{name} is {article(job)}. {subject} gets up at {hour} o'clock and washes {his} face.",
        f"For breakfast {he} has {food} and a cup of {drink}.",
        f"Then {name} takes {his} {thing} and walks to work. There {he} sees {article(animal)}.",
        f"All morning {he} is busy. There is much to do for {article(job)}.",
        f"At noon {name} meets a friend. They eat together and talk about {topic}.",
        f"In the afternoon {he} works until five o'clock. Then {he} goes home.",
        f"In the evening {name} {evening} and puts the {thing} back in its place.",
        f"At ten o'clock {he} goes to bed. It was a good day for {name}.",
    ]
    answer = " ".join(parts[:4]) + "\n\n" + " ".join(parts[4:])
    return ask, answer, f"{name} is {article(job)} ({he}). I go from morning to night."
