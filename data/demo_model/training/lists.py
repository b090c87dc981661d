"""Work on short lists: reverse, sort, count, pick, join, membership, numbering, spelling, copying.

One wording has one answer, since the evaluation compares whole answers. The items decide the side
of the split, so no list of the evaluation is ever seen in training under the same operation.
"""

from collections.abc import Callable

from .chat_format import Chat, assistant, user
from .draw import Draw
from .words import WORDS, made_up, noun

_ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh"]
_COUNTS = ["zero", "one", "two", "three", "four", "five", "six", "seven"]

Task = tuple[str, str, str]
"""Question, answer, and the reasoning of thinking mode."""


def _reverse(draw: Draw, items: list[str]) -> Task:
    listed, answer = ", ".join(items), ", ".join(items[::-1])
    ask = draw.pick(
        f"Write this list in reverse order: {listed}", f"Reverse this list: {listed}",
        f"Put these items in the opposite order: {listed}", f"{listed}\n\nReverse the list.",
    )  # fmt: skip
    return ask, answer, f"The last item is {items[-1]}, so it comes first."


def _sort(draw: Draw, items: list[str]) -> Task:
    listed, answer = ", ".join(items), ", ".join(sorted(items, key=str.lower))
    ask = draw.pick(
        f"Sort these words: {listed}", f"Sort this list by the alphabet: {listed}",
        f"Put these words in alphabetical order: {listed}", f"{listed}\n\nSort the list.",
    )  # fmt: skip
    first = sorted(items, key=str.lower)[0]
    return ask, answer, f"By the alphabet, {first} comes first."


def _count(draw: Draw, items: list[str]) -> Task:
    listed = ", ".join(items)
    ask = draw.pick(
        f"How many items are in this list? {listed}", f"Count the items: {listed}",
        f"How many words are there? {listed}",
    )  # fmt: skip
    numbered = ", ".join(f"{place} {item}" for place, item in enumerate(items, 1))
    return ask, f"There are {len(items)} items.", numbered + "."


def _pick_one(draw: Draw, items: list[str]) -> Task:
    place, listed = draw.number(0, len(items) - 1), ", ".join(items)
    ask = draw.pick(
        f"What is item number {place + 1} in this list? {listed}",
        f"What is the {_ORDINALS[place]} item? {listed}",
        f"Which item is number {place + 1}? {listed}",
    )
    if draw.chance(0.3):
        place, ask = len(items) - 1, f"What is the last item? {listed}"
    numbered = ", ".join(f"{n} {item}" for n, item in enumerate(items[: place + 1], 1))
    return ask, items[place], numbered + "."


def _ends(draw: Draw, items: list[str]) -> Task:
    count, listed = draw.number(2, min(3, len(items) - 1)), ", ".join(items)
    word = draw.pick(str(count), _COUNTS[count])
    if draw.chance(0.5):
        which, answer = "first", items[:count]
    else:
        which, answer = "last", items[-count:]
    ask = draw.pick(
        f"What are the {which} {word} items? {listed}",
        f"Give me the {which} {word} items of this list: {listed}",
    )
    return ask, ", ".join(answer), f"I take the {which} {count} of {len(items)} items."


def _contains(draw: Draw, items: list[str]) -> Task:
    inside, listed = draw.chance(0.5), ", ".join(items[:-1])
    item = draw.choice(items[:-1]) if inside else items[-1]
    ask = draw.pick(f"Is {item} in this list? {listed}", f"Does this list contain {item}? {listed}")
    answer = f"Yes, {item} is in the list." if inside else f"No, {item} is not in the list."
    return ask, answer, f"I look for {item}. It is {'there' if inside else 'not there'}."


def _number_lines(draw: Draw, items: list[str]) -> Task:
    listed = ", ".join(items)
    ask = draw.pick(f"Make a numbered list: {listed}", f"Number these items: {listed}")
    answer = "\n".join(f"{place}. {item}" for place, item in enumerate(items, 1))
    return ask, answer, f"There are {len(items)} items, one a line."


def _bullets(draw: Draw, items: list[str]) -> Task:
    listed = ", ".join(items)
    ask = draw.pick(f"Make a bullet list: {listed}", f"Write one item a line: {listed}")
    return ask, "\n".join(f"- {item}" for item in items), f"There are {len(items)} items."


def _join(draw: Draw, items: list[str]) -> Task:
    sign, name = draw.pick(("-", "a dash"), ("+", "a plus sign"), ("/", "a slash"), (" ", "spaces"))
    listed = ", ".join(items)
    ask = draw.pick(f"Join these words with {name}: {listed}", f"Put {name} between: {listed}")
    return ask, sign.join(items), f"Between the words goes {name}."


def _copy(draw: Draw, items: list[str]) -> Task:
    text = " ".join(items)
    ask = draw.pick(f"Repeat after me: {text}", f"Say exactly this: {text}", f"Copy: {text}")
    return ask, text, "I write the same words again."


def _longest(draw: Draw, items: list[str]) -> Task:
    which = draw.pick("first", "last")
    ranked = sorted(items, key=str.lower)
    answer = ranked[0] if which == "first" else ranked[-1]
    ask = f"Which of these words comes {which} in the alphabet? {', '.join(items)}"
    return ask, answer, f"In order: {', '.join(ranked)}."


_OPERATIONS: list[tuple[Callable[[Draw, list[str]], Task], float]] = [
    (_reverse, 3), (_sort, 4), (_count, 1.5), (_pick_one, 2.5), (_ends, 1.5), (_contains, 1),
    (_number_lines, 1), (_bullets, 0.5), (_join, 1), (_copy, 1.5), (_longest, 1),
]  # fmt: skip


def _items(draw: Draw) -> list[str]:
    count = draw.number(3, 6)
    if draw.chance(0.1):
        made = [made_up(draw) for _ in range(count)]
        return list(dict.fromkeys(made)) if len(set(made)) >= 3 else _items(draw)
    names = WORDS["girls"] + WORDS["boys"]
    return draw.sample(draw.pick(WORDS["animals"], WORDS["fruits"], names, WORDS["nouns"]), count)


def word_list(draw: Draw) -> Chat:
    """An operation on three to six words."""
    operations, weights = zip(*_OPERATIONS, strict=True)
    operation = draw.rng.choices(operations, weights)[0]
    items = draw.until(lambda: _items(draw), lambda made: f"{operation.__name__} {made}")
    return _chat(*operation(draw, items))


def number_list(draw: Draw) -> Chat:
    """Sorting, smallest or largest of three to six numbers below 100."""

    def make() -> list[int]:
        return draw.sample(range(1, 100), draw.number(3, 6))

    numbers = draw.until(make, lambda made: f"numbers {made}")
    listed, ranked = ", ".join(map(str, numbers)), sorted(numbers)
    task = draw.number(0, 5)
    order = f"From small to large: {', '.join(map(str, ranked))}."
    if task <= 2:
        ask = draw.pick(f"Sort these numbers: {listed}", f"Put these numbers in order: {listed}")
        return _chat(ask, ", ".join(map(str, ranked)), f"The smallest is {ranked[0]}.")
    if task == 3:
        ask = f"Sort these numbers from large to small: {listed}"
        return _chat(ask, ", ".join(map(str, reversed(ranked))), f"The largest is {ranked[-1]}.")
    which, value = draw.pick(("smallest", ranked[0]), ("largest", ranked[-1]))
    return _chat(f"What is the {which} number? {listed}", str(value), order)


def spelling(draw: Draw) -> Chat:
    """A word letter by letter; a closed list, so the split goes by wording and word."""

    def make() -> tuple[str, str]:
        word = (
            noun(draw) if draw.chance(0.5) else draw.choice(WORDS[draw.pick("animals", "fruits")])
        )
        return word, draw.pick('Spell the word "{}".', "Spell {}.", "How do you spell {}?")

    word, ask = draw.until(make, lambda made: made[1].format(made[0]))
    letters = "-".join(word.replace(" ", "").upper())
    return _chat(ask.format(word), letters, f"The word is {word}.")


def list_chat(draw: Draw) -> Chat:
    """Any of the list tasks."""
    share = draw.rng.random()
    if share < 0.76:
        return word_list(draw)
    return number_list(draw) if share < 0.9 else spelling(draw)


def _chat(question: str, answer: str, thought: str) -> Chat:
    messages = [user(question), assistant(answer, thought)]
    return Chat(kind="list", messages=messages, check={"text": answer})
