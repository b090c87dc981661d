"""Chats of several turns in which the user tells something and asks for it later.

Between telling and asking stand other questions. The facts decide the side of the split.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .chat_format import Chat, Message, assistant, user
from .draw import Draw
from .words import WORDS, article, city, code, first_name, sentence, surname

_NOTED = (
    "Okay, I will remember that.",
    "Got it.",
    "Noted.",
    "Thank you, I will keep that in mind.",
)


@dataclass(frozen=True, slots=True)
class Fact:
    """Something told, how it is asked for, and the one right answer."""

    told: str
    asked: str
    answer: str
    subject: str


def _facts(draw: Draw) -> list[Fact]:
    """One fact of every subject."""
    name, friend, place = first_name(draw), first_name(draw), city(draw)
    pet, job, secret = draw.choice(WORDS["animals"]), draw.choice(WORDS["jobs"]), code(draw)
    color, food = draw.choice(WORDS["colors"]), draw.choice(WORDS["fruits"] + WORDS["foods"])
    age, thing = draw.number(6, 90), draw.choice(WORDS["objects"])
    where = draw.pick("kitchen", "garden", "cellar", "hall", "car", "office", "bedroom")
    full = f"{name} {surname(draw)}"
    return [
        Fact(draw.pick(f"My name is {name}.", f"I am called {name}."), "What is my name?",
             f"Your name is {name}.", "name"),
        Fact(f"My full name is {full}.", "What is my full name?", f"Your full name is {full}.",
             "full"),
        Fact(draw.pick(f"I have a pet {pet}.", f"My pet is {article(pet)}."), "What pet do I have?",
             f"You have a pet {pet}.", "pet"),
        Fact(draw.pick(f"I live in {place}.", f"My home is in {place}."), "Where do I live?",
             f"You live in {place}.", "city"),
        Fact(draw.pick(f"Remember this code: {secret}.", f"The code is {secret}."),
             "What was the code?", f"The code was {secret}.", "code"),
        Fact(f"My favorite color is {color}.", "What is my favorite color?",
             f"Your favorite color is {color}.", "color"),
        Fact(f"I like to eat {food}.", "What do I like to eat?", f"You like to eat {food}.",
             "food"),
        Fact(draw.pick(f"I am {age} years old.", f"My age is {age}."), "How old am I?",
             f"You are {age} years old.", "age"),
        Fact(f"I work as {article(job)}.", "What is my job?", f"You work as {article(job)}.",
             "job"),
        Fact(f"My best friend is {friend}.", "Who is my best friend?",
             f"Your best friend is {friend}.", "friend"),
        Fact(f"I put the {thing} in the {where}.", f"Where is the {thing}?",
             f"The {thing} is in the {where}.", "place"),
    ]  # fmt: skip


def memory_chat(draw: Draw, filler: Callable[[Draw], Chat]) -> Chat:
    """One to four facts, up to three turns of `filler`, then a question for one of the facts."""

    def make() -> list[Fact]:
        return draw.sample(_facts(draw), draw.pick(1, 2, 2, 3, 4))

    facts = draw.until(make, lambda made: " ".join(fact.told for fact in made))
    messages = _telling(draw, facts)
    for _ in range(draw.pick(0, 0, 1, 1, 2, 3)):
        messages += [
            dict(message) for message in filler(draw).messages if message["role"] != "system"
        ]
    fact = draw.choice(facts)
    messages += _asking(fact)
    if draw.chance(0.4) and len(facts) > 1:
        fact = draw.choice([other for other in facts if other is not fact])
        messages += _asking(fact)
    return Chat(kind="memory", messages=messages, check={"text": fact.answer})


def _telling(draw: Draw, facts: list[Fact]) -> list[Message]:
    if len(facts) > 1 and draw.chance(0.35):
        told = " ".join(fact.told for fact in facts)
        return [user(told), assistant(draw.pick(*_NOTED), "The user tells me things to remember.")]
    messages = []
    for fact in facts:
        reply = draw.pick(*_NOTED)
        if fact.subject == "name" and draw.chance(0.6):
            reply = f"Nice to meet you, {fact.answer[13:-1]}!"
        messages += [user(fact.told), assistant(reply, "I keep in mind what the user tells me.")]
    return messages


def _asking(fact: Fact) -> list[Message]:
    return [user(fact.asked), assistant(fact.answer, f"The user said: {sentence(fact.told)}")]


def unknown_fact_chat(draw: Draw) -> Chat:
    """A question for something that was never told."""
    told, missing = draw.sample(_facts(draw), 2)
    messages = _telling(draw, [told]) if draw.chance(0.7) else []
    reply = draw.pick("You have not told me that yet.", "I do not know that. You have not told me.")
    messages += [user(missing.asked), assistant(reply, "The user has not told me this.")]
    return Chat(kind="memory_missing", messages=messages)
