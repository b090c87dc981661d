"""Templates that want too much: memory, time, depth, or what they must not reach."""

from pathlib import Path

import pytest

from flashmoe_lab.chat.template import LONGEST_TEMPLATE, ChatTemplate

ROOT = Path(__file__).parents[2]
GROW = (
    "{% set n = namespace(s='a', l=[1]) %}{% for i in range(99) %}%s{% endfor %}{{ n.s }}{{ n.l }}"
)
TWICE = "{% for i in range(100000) %}{% for j in range(100000) %}%s{% endfor %}{% endfor %}"


def stopped(template: str, deadline_s: float = 10.0) -> str:
    with pytest.raises(ValueError) as caught:
        ChatTemplate(template, "here", deadline_s=deadline_s).render([{"role": "user"}])
    reason = str(caught.value)
    assert reason.startswith("here: ") and "\n" not in reason and len(reason) < 400
    return reason


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**10 }}",
        "{{ [1] * 10**10 }}",
        "{{ 10**10 * ([1] * 10**10) }}",
        GROW.replace("%s", "{% set n.s = n.s ~ n.s %}"),
        GROW.replace("%s", "{% set n.s = n.s + n.s %}"),
        GROW.replace("%s", "{% set n.s = n.s | replace('a', 'aa') %}"),
        GROW.replace("%s", "{% set n.s = n.s.replace('', 'aa') %}"),
        GROW.replace("%s", "{% set n.s = [n.s, n.s] | join %}"),
        GROW.replace("%s", "{% set n.s = '%s%s' % (n.s, n.s) %}"),
        GROW.replace("%s", "{% set n.s = '%s%s' | format(n.s, n.s) %}"),
        GROW.replace("%s", "{% set n.s = '{0}{0}'.format(n.s) %}"),
        GROW.replace("%s", "{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}"),
        # A list that holds another twice is small in memory, and endless as text.
        GROW.replace("%s", "{% set n.l = [n.l, n.l] %}"),
        GROW.replace("%s", "{% set n.l = (n.l, n.l) %}"),
        GROW.replace("%s", "{% set n.l = {'a': n.l, 'b': n.l} %}"),
        GROW.replace("%s", "{% set n.l = dict(a=n.l, b=n.l) %}"),
        GROW.replace("%s", "{% set n.l = {'a': dict(x=n.l).items(), 'b': dict(x=n.l).items()} %}"),
        GROW.replace("%s", "{% set n.l = n.l + n.l %}"),
        GROW.replace("%s", "{% set n.l = [0, 0] | map('default', n.l) | list + [n.l, n.l] %}"),
        "{% set s = 'a' * 1000000 %}{{ range(100000) | join(s) }}",
        "{% set s = 'a' * 1000000 %}{{ s.join(range(100000) | map('string')) }}",
        "{% set s = 'a' * 1000000 %}{% for i in range(100000) %}{{ s }}{% endfor %}",
        "{{ ('a\\n' * 100000) | indent(999) }}",
        "{{ ('a\\n' * 1000) | indent('b' * 100000) }}",
        "{% macro f(x) %}{% set y = x[1:] %}{{ f(y) }}{% endmacro %}{{ f('a' * 1000000) }}",
        TWICE.replace("%s", "x" * 99),
        "{% macro f() %}" + TWICE.replace("%s", "x" * 99) + "{% endmacro %}{{ f() }}",
        "{% set a %}" + TWICE.replace("%s", "x" * 99) + "{% endset %}",
        "{% filter upper %}" + TWICE.replace("%s", "x" * 99) + "{% endfilter %}",
    ],
)
def test_what_is_built_is_bounded(template):
    assert "builds" in stopped(template)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ range(10**12) }}", "Range too big"),
        ("{% set n = namespace(i=9) %}{% for i in range(99) %}{% set n.i = n.i * n.i %}{%endfor%}",
         "bits"),
        ("{{ 2 ** 1000000000 }}", "bits"),
        ("{{ (('f' * 9999) | int(0, 16)) // (('f' * 5000) | int(0, 16)) }}", "bits"),
        ("{{ (('f' * 9999) | int(0, 16)) is divisibleby(7) }}", "bits"),
        ("{{ '%1000000000d' % 1 }}", "width"),
        ("{{ '%*d' % (10**9, 1) }}", "width"),
        ("{{ '%(a)1000000000d' % {'a': 1} }}", "width"),
        ("{{ '%.1000000000f' | format(1) }}", "width"),
        ("{{ '%1000000000d' | format(1) }}", "width"),
        ("{{ '{:1000000000}'.format(1) }}", "width"),
        ("{{ '{:{}}'.format(1, 10**9) }}", "width"),
        ("{{ 'x\\ny' | indent(10**9) }}", "indents"),
        ("{{ [1] | tojson(indent=10**9) }}", "indents"),
        ("{{ 1.5 | round(10**9, 'ceil') }}", "rounds"),
        ("{{ [[1], [2]] | sum(start=[]) }}", "numbers only"),
        ("{{ 'x' | center(10**9) }}", "No filter"),
        ("{{ 'x'.ljust(10**9) }}", "unsafe"),
        ("{{ '\t'.expandtabs(10**9) }}", "unsafe"),
        ("{{ (1).to_bytes(10**9) }}", "unsafe"),
        ("{{ lipsum(10**6) }}", "undefined"),
        ("{{ strftime_now('%1000000000Y') }}", "widths"),
        ("{% macro f(x) %}{{ f(x + 1) }}{% endmacro %}{{ f(1) }}", "too deeply"),
        ("{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}", "too deeply"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "too deeply"),
        ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "nested"),
        (" " * (LONGEST_TEMPLATE + 1), "characters"),
        ("{% include 'x' %}", "loader"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)  # fmt: skip
def test_what_grows_or_nests_is_refused(template, reason):
    assert reason in stopped(template)


@pytest.mark.parametrize(
    "template",
    [
        TWICE.replace("%s", ""),
        TWICE.replace("%s", "{% if i in (1, 2) and j == -1 %}{% endif %}"),
        "{% set l = range(20000) | list %}{{ range(20000) | select('in', l) | list }}",
        "{% set l = range(0, 99999 * (2**61 - 1), 2**61 - 1) %}{{ dict.fromkeys(l) | length }}",
        "{% set l = range(0, 99999 * (2**61 - 1), 2**61 - 1) %}{{ l | unique | list | length }}",
    ],
)
def test_what_takes_too_long_is_stopped(template):
    assert "longer than 0.2 s" in stopped(template, deadline_s=0.2)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ '' | attr('__class__') }}",
        "{{ [''] | map(attribute='__class__') | list }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ '{x.__class__}'.format_map({'x': 1}) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ cycler.__init__ }}",
        "{{ namespace.__init__ }}",
        "{{ dict.__class__ }}",
        "{{ messages['__class__'] }}",
        "{% set n = namespace(__class__=1) %}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
    ],
)
def test_what_is_internal_is_out_of_reach(template):
    reason = stopped(template)
    assert any(word in reason for word in ("unsafe", "not safely", "underscore", "no attribute"))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}{% set a = m.content.replace('i', 'o') %}{{ a }}{%endfor%}", "Ho"),
        ("{{ ['a', 'b'] | join(', ') }}{{ ','.join(['c', 'd']) }}", "a, bc,d"),
        ("{{ [{'x': 1}, {'x': 2}] | join('-', attribute='x') }}", "1-2"),
        ("{{ [1, 2.5] | sum }}{{ [{'x': 1}] | sum(attribute='x') }}", "3.51"),
        ("{{ 'a\nb\n\nc' | indent(2) }}|{{ 'a' | indent(2, true) }}", "a\n  b\n\n  c|  a"),
        ("{{ '%s-%03d' % ('a', 7) }}{{ '%s' | format('b') }}{{ '{:>4}'.format(1) }}", "a-007b   1"),
        ("{{ 'aaa' | replace('a', 'b', 2) }}{{ '-' * 3 }}{{ 2 ** 10 }}{{ 1.26 | round(1) }}",
         "bba---10241.3"),
        ("{{ 7 // 2 }}{{ 7 - 2 }}{{ 6 / 4 }}{{ 7 % 4 }}{{ 2.5 * 2 }}{{ 6 is divisibleby(3) }}",
         "351.535.0True"),
        ("{{ {'a': 'ü<'} | tojson }}{{ [1] | tojson(indent=1) }}", '{"a": "ü<"}[\n 1\n]'),
        ("{{ [1] | tojson(separators=(',', ':'), ensure_ascii=true) }}", "[1]"),
        ("{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a }}{{ dict(x=1).x }}", "21"),
        ("{% generation %}{% set x = 1 %}a{{ x }}{% endgeneration %}{{ x is defined }}", "a1False"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ messages[::-1][0].content[1:] }}{{ bos_token }}{{ documents is none }}", "i<s>True"),
    ],
)  # fmt: skip
def test_what_templates_need_works(template, text):
    chat = ChatTemplate(template, special_tokens={"bos_token": "<s>"})
    assert chat.render([{"role": "user", "content": "Hi"}]) == text


def test_a_render_leaves_nothing_for_the_next():
    chat = ChatTemplate("{{ messages[0].content * 1000000 }}")
    for _ in range(99):  # more together than one render may build
        assert len(chat.render([{"role": "user", "content": "a"}])) == 1000000


def test_long_chats_are_no_attack():
    chat = ChatTemplate.read(ROOT / "data" / "demo_model")
    turns = [{"role": "user", "content": "é" * 5000}, {"role": "assistant", "content": "b" * 5000}]
    assert len(chat.render([*turns * 500, turns[0]])) > 5_000_000
