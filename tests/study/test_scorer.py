"""The scorer's rules, on answers written by hand."""

import pytest

from flashmoe_lab.study.scorer import Verdict, first_json, judge, parse_calls, tally

CALL = "<tool_call>\n<function=get>\n<parameter=a>\n{}\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (CALL.format("x y") + "<|im_end|>", Verdict(True, True, True)),
        ("thought\n</think>\n\nI look.\n\n" + CALL.format("x y"), Verdict(True, True, True)),
        (CALL.format("x"), Verdict(True, False, True)),
        (CALL.format("x y") + "\n" + CALL.format("x y"), Verdict(False, False, True)),
        (CALL.format("x y").replace("get", "put"), Verdict(True, False, False)),
        (CALL.format("x y")[:-3], Verdict(False, False, False)),
        ("It is sunny.", Verdict(False, False, False)),
        (CALL.format("x y") + "\n<tool_call>\n<function=get", Verdict(False, False, False)),
        (
            CALL.format("x y").replace("</function>", "junk</function>"),
            Verdict(False, False, False),
        ),
        (CALL.format("x y\n</parameter>\n<parameter=a>\nx y"), Verdict(False, False, False)),
        (CALL.format("x y\n</parameter>\n<parameter=b>\nx y"), Verdict(True, False, True)),
        (CALL.format(" x y"), Verdict(True, False, True)),
    ],
)
def test_call(text: str, verdict: Verdict) -> None:
    assert judge({"call": {"name": "get", "arguments": {"a": "x y"}}}, text) == verdict


@pytest.mark.parametrize(
    ("value", "written", "exact"),
    [
        (True, "True", True),
        (True, "true", False),
        (None, "None", True),
        (None, "null", False),
        (74, "74", True),
        (74, "74.0", False),
        (4.5, "4.5", True),
        ("True", "True", True),
        ("né", "né", True),
        (["né", 1], '["né", 1]', True),
        (["a", 1], '["a",1]', False),
    ],
)
def test_arguments_are_compared_as_the_template_writes_them(
    value: object, written: str, exact: bool
) -> None:
    check = {"call": {"name": "get", "arguments": {"a": value}}}
    assert judge(check, CALL.format(written)).exact == exact


def test_several_calls_in_order() -> None:
    check = {"calls": [{"name": "get", "arguments": {"a": n}} for n in (1, 2)]}
    one, two = CALL.format(1), CALL.format(2)
    assert judge(check, one + "\n" + two) == Verdict(True, True)
    assert judge(check, two + "\n" + one) == Verdict(True, False)
    assert judge(check, one) == Verdict(True, False)
    assert judge(check, "none") == Verdict(False, False)


def test_arguments_that_are_no_text_are_compared_as_json() -> None:
    check = {"call": {"name": "get", "arguments": {"a": {"b": [1, True]}}}}
    assert judge(check, CALL.format('{"b": [1, true]}')).exact
    assert not judge(check, CALL.format('{"b": [1, 1]}')).exact


def test_a_value_may_span_lines() -> None:
    assert parse_calls(CALL.format("x\ny")) == [("get", {"a": "x\ny"})]


def test_number_of_calls() -> None:
    two = CALL.format(1) + "\n" + CALL.format(2)
    assert judge({"ncalls": 2}, two) == Verdict(True, True)
    assert judge({"ncalls": 3}, two) == Verdict(True, False)
    assert judge({"ncalls": 2}, "none") == Verdict(False, False)


@pytest.mark.parametrize(
    ("text", "parse", "exact"),
    [
        ('{"a": 1, "b": [true]}', True, True),
        ('Here: {"b": [true],\n "a": 1} and more', True, True),
        ('{"a": 1, "b": [1]}', True, False),
        ('{"a": 1, "b": [true]', False, False),
        ('{"a": 1, "a": 1, "b": [true]}', False, False),
        ("{'a': 1, 'b': [True]}", False, False),
        ('{"a": 1.0, "b": [true]}', True, True),
        ("nothing", False, False),
        ("", False, False),
    ],
)
def test_json(text: str, parse: bool, exact: bool) -> None:
    assert judge({"json": {"a": 1, "b": [True]}}, text) == Verdict(parse, exact)


def test_number_is_the_last_of_the_answer() -> None:
    assert judge({"number": 85}, "40 + 40 = 80. 80 + 5 = 85.").exact
    assert judge({"number": -3}, "2 - 5 = -3").exact
    assert not judge({"number": 85}, "85, I think, or 86").exact
    assert judge({"number": 1}, "one") == Verdict(False, False)


def test_text_is_the_whole_answer() -> None:
    assert judge({"text": "a, b"}, " a, b\n<|im_end|>junk").exact
    assert not judge({"text": "a, b"}, "a, b, c").exact
    assert not judge({"text": "a, b"}, "A, b").exact
    assert judge({"text": "a"}, "a").parse is None


def test_an_unknown_check_is_an_error() -> None:
    with pytest.raises(ValueError, match="call, calls, ncalls, json, number or text"):
        judge({"color": "red"}, "red")


def test_first_json_wants_a_value() -> None:
    assert first_json("[1] [2]") == [1]
    with pytest.raises(ValueError):
        first_json("[1")


def test_tally() -> None:
    verdicts = [("tool", Verdict(True, True, True)), ("tool", Verdict(True, False, False))]
    shares = tally([*verdicts, ("list", Verdict(None, True))])
    assert shares["list"] == {"n": 1, "exact": 1.0}
    assert shares["tool"] == {"n": 2, "parse": 1.0, "exact": 0.5, "name": 0.5}
    assert shares["ALL"] == {"n": 3, "parse": 1.0, "exact": 0.6667, "name": 0.5}
    assert tally([])["ALL"] == {"n": 0}
