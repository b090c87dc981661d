"""Where templates run: Jinja's immutable sandbox, with a bound on what a template may build.

Jinja's sandbox decides what a template can reach. It bounds neither memory nor single calls, so
this does:

* Everything a template builds (text, lists, results of filters, macros and methods, output) is paid
  for from one budget a render, by its length, before or as it comes into being.
* No value may be larger than a limit, counted as a tree: a list that holds another one twice counts
  it twice. So a single call into C (repr, JSON, comparing, sorting), which nothing can interrupt,
  has little to do.
* Operations whose result is larger than their operands (times, power, join, replace, indent, format
  with widths) are refused before they run if the result would be; those that no chat template needs
  (center, zfill, expandtabs, translate, encode, wordwrap, lipsum and the like) are not there.
* Nothing is evaluated at compile time.

Not bounded here: time. A template that builds nothing loops until its deadline (deadline.py).
Values that are given count only towards the limits, which grow with them.
"""

import functools
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

from flashmoe_lab.chat.sandbox_values import (
    ITEM,
    TemplateDict,
    TemplateNamespace,
    TooLarge,
    bounded_round,
    check_bits,
    divisible,
    largest_text,
    texts_of,
    to_json,
    weight,
)

BUDGET, BUDGET_PER_GIVEN = 1 << 26, 32
LARGEST, LARGEST_PER_GIVEN = 1 << 20, 4
_PIECE = 8  # what a piece of output counts besides its characters
_WIDTH = 999
_NO_CONTEXT: Any = None

_GROWING = {
    str: {"center", "encode", "expandtabs", "format_map", "ljust", "maketrans", "rjust",
          "striptags", "translate", "unescape", "zfill"},
    int: {"to_bytes"},
}  # fmt: skip
_NO_FILTERS = ("batch", "center", "forceescape", "pprint", "random", "slice", "striptags",
               "urlize", "wordwrap", "xmlattr")  # fmt: skip
# These hand on what was there before.
_FREE_FILTERS = ("attr", "d", "default", "first", "items", "last", "max", "min", "safe")


class Environment(ImmutableSandboxedEnvironment):
    """Compiles templates whose renders keep to a budget; `budget` must be called before each, in
    the thread that renders."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        self._ledger = threading.local()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=self._piece,
            extensions=[loopcontrols, _Generation],
        )
        self.code_generator_class = _Generator
        for name in _NO_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters |= {
            "join": self._join, "replace": self._replace, "indent": self._indent,
            "sum": self._sum, "tojson": to_json, "format": self._format,
            "round": bounded_round(self.filters["round"]),
        }  # fmt: skip
        self.tests["divisibleby"] = divisible
        for name, function in self.filters.items():
            if name not in _FREE_FILTERS:
                self.filters[name] = self._paying(function)
        self.globals |= {"namespace": TemplateNamespace, "dict": TemplateDict()}

    def budget(self, given: Any = ()) -> None:
        """Starts a new account for a render of these values.

        Raises:
            TooLarge: what is given goes beyond any chat.
        """
        size = weight(given, 1 << 30)
        self._ledger.left = BUDGET + BUDGET_PER_GIVEN * size
        self._ledger.largest = LARGEST + LARGEST_PER_GIVEN * size

    def pay(self, size: int) -> None:
        """Takes `size` from what the render may still build."""
        self._ledger.left -= size
        if self._ledger.left < 0:
            raise TooLarge("it builds more text than a chat can need")

    def made(self, value: Any) -> Any:
        """The same value, paid for."""
        if isinstance(value, str):
            self.pay(len(value))
        elif isinstance(value, list | tuple | dict | set):
            self.pay(ITEM * len(value))
        self._weigh(value)
        return value

    def joined(self, parts: Iterable[Any], between: str = "") -> str:
        """The parts as one text."""
        texts = [str(part) for part in parts]
        self._expect(sum(map(len, texts)) + len(between) * len(texts))
        return self.made(between.join(texts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic, where neither the numbers nor the result are too large."""
        check_bits(left, right)
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    self._expect(self._weigh(value) * max(times, 0))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            check_bits(left, bits=left.bit_length() * right)
        elif operator == "%" and isinstance(left, str):
            # A width follows the % or, where there are names, the name's bracket.
            if re.search(("[%)]" if "%(" in left else "%") + r"[^a-zA-Z%)]*(\*|\d{4})", left):
                raise TooLarge(f"it formats with a width above {_WIDTH}")
            self._expect(len(left) + left.count("%") * (self._weigh(right) + _WIDTH))
        return self.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        """A call in a template: of a macro, a method or a global."""
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name in ("join", "replace"):
            # Without what the compiler adds for functions that take the context.
            given = {key: value for key, value in kwargs.items() if not key.startswith("_")}
            if name == "join":
                return __self.joined(texts_of(*args, **given), str(owner))
            return __self._replace(owner, *args, **given)
        result = super().call(__context, __obj, *args, **kwargs)
        return result if isinstance(owner, Mapping) else __self.made(result)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may have this attribute."""
        growing = any(isinstance(obj, kind) and attr in names for kind, names in _GROWING.items())
        return not growing and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """An error at once for what is internal; a plain Undefined would render as nothing."""
        found = super().unsafe_undefined(obj, attribute)
        if attribute.startswith("_"):
            raise SecurityError(found._undefined_message)
        return found

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """str.format, without widths that are pure size; nothing for other values."""
        if super().wrap_str_format(value) is None:
            return None
        if value.__name__ != "format":
            raise SecurityError("access to attribute 'format_map' of 'str' object is unsafe.")
        text: str = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            size = self._weigh(args) + self._weigh(kwargs) + _WIDTH
            self._expect(len(text) + text.count("{") * size)
            return _Formatter(self).vformat(text, args, kwargs)

        return bounded

    @pass_context
    def _piece(self, context: Context, value: Any) -> str:
        # Takes the context so that constants are not folded at compile time.
        text = str(value)
        self.pay(len(text))
        return text

    def _weigh(self, value: Any) -> int:
        return weight(value, self._ledger.largest)

    def _expect(self, size: int) -> None:
        if size > self._ledger.largest:
            raise TooLarge(largest_text(self._ledger.largest))

    def _paying(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # with the mark of what Jinja is to pass
        def paying(*args: Any, **kwargs: Any) -> Any:
            return self.made(function(*args, **kwargs))

        return paying

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = map(make_attrgetter(self, attribute), value)
        return self.joined(value, str(d))

    def _replace(self, s: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new, count = str(s), str(old), str(new), -1 if count is None else count
        times = text.count(old) if count < 0 else min(count, text.count(old))
        self._expect(len(text) + times * max(0, len(new) - len(old)))
        return self.made(text.replace(old, new, count))

    def _indent(
        self, s: str, width: int | str = 4, first: bool = False, blank: bool = False
    ) -> str:
        if isinstance(width, int) and width > _WIDTH:
            raise TooLarge(f"it indents by more than {_WIDTH}")
        before = width if isinstance(width, str) else " " * width
        lines = (str(s) + "\n").splitlines()
        self._expect(len(s) + len(lines) * len(before))
        rest = [before + line if line or blank else line for line in lines[1:]]
        text = "\n".join([lines[0], *rest]) if lines else ""
        return before + text if first else text

    def _sum(self, iterable: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
        if attribute is not None:
            iterable = map(make_attrgetter(self, attribute), iterable)
        for value in iterable:
            if not isinstance(value, int | float):
                raise TypeError("sum adds numbers only")
            start += value
        return start

    def _format(self, value: Any, *args: Any, **kwargs: Any) -> str:
        return self.call_binop(_NO_CONTEXT, "%", str(value), kwargs or args)


class _Generator(CodeGenerator):
    """Python code that pays for what it builds."""

    def visit_Output(self, node: nodes.Output, frame: Frame) -> None:
        fixed = sum(len(c.data) for c in node.nodes if isinstance(c, nodes.TemplateData))
        self.writeline(f"environment.pay({fixed + _PIECE * len(node.nodes)})")
        super().visit_Output(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._paid(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._paid(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._paid(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._paid(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def _paid(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.made(")
        visit(node, frame)
        self.write(")")


class _Generation(Extension):
    """{% generation %}, with which templates mark what the model wrote; it renders as it stands."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        if re.search(r"\d{4}", format_spec):
            raise TooLarge(f"it formats with a width above {_WIDTH}")
        return super().format_field(value, format_spec)
