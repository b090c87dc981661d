"""Sums: addition and subtraction up to 99, the multiplication table to 12, short word problems.

Digits are single tokens. An answer repeats the sum before the result, so that every wording leads
to one form that is practised often; with thinking on, tens and ones come one by one. The pairs of
an addition or subtraction are split between training and evaluation; the multiplication table is
too small for that and is split by wording.
"""

from .chat_format import Chat, assistant, user
from .draw import Draw
from .words import WORDS, first_name, plural

_WORDS = {"+": "plus", "-": "minus", "*": "times"}
_WORDINGS = (
    "What is {a} {word} {b}?", "{a} {op} {b}", "Calculate {a} {op} {b}.", "{a} {op} {b} = ?",
    "How much is {a} {op} {b}?", "What is {a} {op} {b}?", "{a} {word} {b}",
    "Work out {a} {op} {b}.",
    "Can you tell me what {a} {word} {b} is?", "Compute {a} {word} {b}.",
)  # fmt: skip


def result(a: int, op: str, b: int) -> int:
    """The value of one operation."""
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def steps(a: int, op: str, b: int) -> str:
    """How to get the value by tens and ones, as thinking mode shows it."""
    value = result(a, op, b)
    tens, ones = b // 10 * 10, b % 10
    if op == "*" or tens == 0 or ones == 0:
        return f"{a} {op} {b} = {value}."
    between = result(a, op, tens)
    return (
        f"{b} is {tens} and {ones}. {a} {op} {tens} = {between}. {between} {op} {ones} = {value}."
    )


def plain_sum(draw: Draw) -> Chat:
    """One operation, asked in one of ten ways."""
    a, op, b, wording = draw.until(
        lambda: (*_operands(draw), draw.choice(_WORDINGS)), lambda made: _key(*made)
    )
    question = wording.format(a=a, b=b, op=op, word=_WORDS[op])
    value = result(a, op, b)
    answer = draw.pick(f"{a} {op} {b} = {value}", f"{a} {op} {b} = {value}.")
    return _chat(question, answer, steps(a, op, b), value)


def word_problem(draw: Draw) -> Chat:
    """A story of one or two operations."""
    return draw.pick(_gain_or_loss, _two_steps, _groups, _difference)(draw)


def sum_chat(draw: Draw) -> Chat:
    """Any of the sums."""
    return plain_sum(draw) if draw.chance(0.72) else word_problem(draw)


def _operands(draw: Draw) -> tuple[int, str, int]:
    op = draw.pick("+", "+", "-", "-", "*")
    if op == "*":
        return draw.number(0, 12), op, draw.number(0, 12)
    a, b = draw.number(0, 99), draw.number(0, 99)
    return (max(a, b), op, min(a, b)) if op == "-" else (a, op, b)


def _key(a: int, op: str, b: int, wording: str = "") -> str:
    """What the split goes by: a pair whatever its order, or a product with its wording."""
    if op == "*":
        return f"{a}*{b} {wording}"
    return f"{min(a, b)}+{max(a, b)}" if op == "+" else f"{a}-{b}"


def _chat(question: str, answer: str, thought: str, value: int) -> Chat:
    messages = [user(question), assistant(answer, thought)]
    return Chat(kind="arith", messages=messages, check={"number": value})


def _things(draw: Draw, count: int, word: str) -> str:
    return f"{count} {word if count == 1 else plural(word)}"


def _pair(draw: Draw, op: str, high_a: int, high_b: int) -> tuple[int, int]:
    def make() -> tuple[int, int]:
        a, b = draw.number(1, high_a), draw.number(1, high_b)
        return (max(a, b) + 1, min(a, b)) if op == "-" else (a, b)

    return draw.until(make, lambda made: _key(made[0], op, made[1]))


def _gain_or_loss(draw: Draw) -> Chat:
    op = draw.pick("+", "-")
    a, b = _pair(draw, op, 60, 39)
    name, word = first_name(draw), draw.choice(WORDS["fruits"])
    if op == "+":
        how = draw.pick("gets {b} more", "buys {b} more", "finds {b} more")
        ask = "How many does {n} have now?"
    else:
        how = draw.pick("gives away {b}", "eats {b}", "loses {b}")
        ask = draw.pick("How many are left?", "How many does {n} have now?")
    text = f"{name} has {_things(draw, a, word)} and {how.format(b=b)}. {ask.format(n=name)}"
    value = result(a, op, b)
    return _chat(text, f"{a} {op} {b} = {value}. The answer is {value}.", steps(a, op, b), value)


def _two_steps(draw: Draw) -> Chat:
    def make() -> tuple[int, int, int]:
        a, b = draw.number(2, 40), draw.number(1, 30)
        return a, b, draw.number(1, a + b - 1)

    a, b, c = draw.until(make, lambda made: "{}+{}-{}".format(*made))
    name, word = first_name(draw), draw.choice(WORDS["fruits"] + WORDS["objects"])
    more = draw.pick("buys", "finds", "gets")
    less = draw.pick("gives away", "sells", "loses")
    ask = draw.pick("How many are left?", f"How many does {name} have now?")
    text = f"{name} has {_things(draw, a, word)}, {more} {b} more and then {less} {c}. {ask}"
    left = a + b - c
    work = f"{a} + {b} = {a + b}. {a + b} - {c} = {left}."
    return _chat(text, f"{work} The answer is {left}.", work, left)


def _groups(draw: Draw) -> Chat:
    def make() -> tuple[int, int, str]:
        return draw.number(2, 12), draw.number(2, 12), draw.choice(WORDS["fruits"])

    a, b, word = draw.until(make, lambda made: "{}*{} {}".format(*made))
    box = draw.pick("boxes", "bags", "baskets", "jars")
    ask = draw.pick("How many are there in all?", f"How many {plural(word)} are there?")
    text = f"There are {a} {box} with {_things(draw, b, word)} in each. {ask}"
    work = f"{a} * {b} = {a * b}."
    return _chat(text, f"{work} The answer is {a * b}.", work, a * b)


def _difference(draw: Draw) -> Chat:
    a, b = _pair(draw, "-", 60, 60)
    more, fewer, word = first_name(draw), first_name(draw), draw.choice(WORDS["objects"])
    text = (
        f"{more} has {_things(draw, a, word)} and {fewer} has {b}. How many more does {more} have?"
    )
    work = f"{a} - {b} = {a - b}."
    return _chat(text, f"{work} The answer is {a - b}.", steps(a, "-", b), a - b)
