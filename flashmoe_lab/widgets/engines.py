"""The engine that a setting asks for: the one that was given, or another of the same model.

At most one other is open for an engine, however many widgets it has, so that bits and bank can be
changed again and again and memory holds two at the most. An engine that the user opened is never
closed here.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from flashmoe_lab.engine import Engine, EngineSettings
from flashmoe_lab.storage.page_cache import evict, warm
from flashmoe_lab.widgets.forms import Form, form_of, forms_of
from flashmoe_lab.widgets.give_back import give_back, keep_little
from flashmoe_lab.widgets.one_thread import in_one_thread
from flashmoe_lab.widgets.setting import AS_IT_IS, WARM, Setting


class Engines:
    """The other engine of one that was given; use `engine_for`."""

    def __init__(self) -> None:
        keep_little()
        self._lock = threading.Lock()
        self._key: tuple[Form, EngineSettings] | None = None
        self._other: Engine | None = None

    @contextmanager
    def engine(self, given: Engine, setting: Setting) -> Iterator[Engine]:
        """Within the `with`, the engine for a setting, nobody else's meanwhile."""
        with self._lock:
            form, settings = _wanted(given, setting)
            if form.path == given.checkpoint.path and settings == given.settings:
                self.close_other()
                yield given
                return
            if self._key != (form, settings) or self._other is None:
                self.close_other()  # first: both in memory may be too much
                self._other = in_one_thread(lambda: Engine(form.open(), settings))
                self._key = form, settings
            yield self._other

    def close_other(self) -> None:
        """Free the other engine, if there is one."""
        other, self._other, self._key = self._other, None, None
        if other is not None:
            other.close()
            del other
            give_back()  # a bank is large, and cycles hold it


_of: "weakref.WeakKeyDictionary[Engine, Engines]" = weakref.WeakKeyDictionary()
_of_lock = threading.Lock()


@contextmanager
def engine_for(given: Engine, setting: Setting) -> Iterator[Engine]:
    """Within the `with`, the engine that a setting asks for; other users of `given` wait.

    Raises:
        ValueError: the setting names a form that is not there, or a bank that cannot be.
        MemoryError: the bank does not fit.
    """
    with _of_lock:
        engines = _of.setdefault(given, Engines())
    with engines.engine(given, setting) as engine:
        yield engine


def close_others(given: Engine) -> None:
    """Close what was opened beside an engine; the engine itself stays open."""
    if (engines := _of.get(given)) is not None:
        engines.close_other()


def prepare(engine: Engine, setting: Setting) -> None:
    """Bring bank and page cache into the state that the setting wants, between runs.

    Raises:
        NotImplementedError: the page cache of this system is unknown to us.
    """
    if setting.page_cache != AS_IT_IS:
        engine.call(lambda: _empty(engine, warm if setting.page_cache == WARM else evict))


def _empty(engine: Engine, bring: Callable[[Path], int]) -> None:
    with engine.bank.lock:
        engine.bank.forget(engine.bank.contents())
    for layer in engine.checkpoint.layers:
        bring(layer.path)


def _wanted(given: Engine, setting: Setting) -> tuple[Form, EngineSettings]:
    settings = given.settings
    if setting.bank_gb is not None:
        settings = replace(settings, bank_gb=setting.bank_gb, resident=False)
    if setting.policy is not None:
        settings = replace(settings, policy=setting.policy)
    if setting.bits is None:
        return form_of(given.checkpoint), settings
    forms = {form.label: form for form in forms_of(given.checkpoint)}
    if setting.bits not in forms:
        raise ValueError(f"bits is {setting.bits!r}; there are {', '.join(map(repr, forms))}")
    return forms[setting.bits], settings
