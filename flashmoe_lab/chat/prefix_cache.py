"""What models have read before, so that a prompt which begins the same need not be read again.

A tree of token ids: a node holds the keys and values of its own tokens, and those at which a later
prompt may go on hold the recurrent matrices too (a snapshot). Beginnings that are shared are held
once. Snapshots are made at the first and the last end of a turn in a prompt, every `spacing`
tokens, and where a run ends. Within `max_nbytes` the least recently used goes first.

A run's numbers are the same with it as without: on a CPU bit for bit. Only what was computed in the
same way is reused: see identity.py. Its arrays are made in an engine's thread; several engines and
threads may share one.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from flashmoe_lab.chat.snapshot import (
    Matrices,
    Rows,
    kept_nbytes,
    matrices_of,
    pairs_nbytes,
    refill,
    rows_of,
    split_rows,
)
from flashmoe_lab.state import SequenceState

SPACING = 512  # tokens; as many as a prompt is read at a time


@dataclass(slots=True, eq=False)
class Node:
    """Tokens that follow those of the parent; a root has none.

    Attributes:
        length: how many tokens there are from the root to the end of this.
        matrices: None where nothing can go on from here.
        used: when it was made or last gone on from, by the cache's own count.
    """

    tokens: tuple[int, ...]
    rows: Rows
    parent: "Node | None"
    length: int
    matrices: Matrices | None = None
    children: "dict[int, Node]" = field(default_factory=dict)
    used: int = 0

    def path(self) -> "list[Node]":
        """From below the root to here."""
        found, node = [], self
        while node.parent is not None:
            found.append(node)
            node = node.parent
        return found[::-1]

    def below(self) -> "Iterator[Node]":
        """This and all that follow from it, parents first."""
        left: list[Node] = [self]
        while left:
            node = left.pop()
            yield node
            left.extend(node.children.values())


class PrefixCache:
    """Snapshots of what was read, for `engine.stream_generate(..., cache=...)`.

    Args:
        max_nbytes: of all that is kept.
        spacing: tokens between snapshots in a long prompt. Fewer make edits cheaper and take more
            memory.

    Attributes:
        nbytes: kept now.
    """

    def __init__(self, max_nbytes: int = 2 * 10**9, *, spacing: int = SPACING) -> None:
        for name, value in (("max_nbytes", max_nbytes), ("spacing", spacing)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.max_nbytes, self.spacing = max_nbytes, spacing
        self.nbytes = 0
        self.lock = threading.RLock()
        self.roots: dict[str, Node] = {}
        self._clock = 0

    def __len__(self) -> int:
        """How many snapshots there are."""
        with self.lock:
            return sum(node.matrices is not None for node in self._nodes())

    def open(
        self,
        identity: str,
        prompt: Sequence[int],
        end_ids: Collection[int],
        valid: Callable[[], bool] = lambda: True,
    ) -> "Prefix":
        """What one run takes from here and adds.

        Args:
            identity: of how the run computes.
            end_ids: tokens that end a turn.
            valid: whether the run still computes like that; else nothing of it is kept.
        """
        return Prefix(self, identity, prompt, end_ids, valid)

    def longest(self, identity: str, tokens: Sequence[int]) -> Node | None:
        """The snapshot from which the most of `tokens` is known, but for the last: its logits are
        wanted."""
        with self.lock:
            path = self._walk(identity, tokens[:-1])[0].path()
            return next((n for n in reversed(path) if n.matrices is not None), None)

    def add(self, identity: str, state: SequenceState) -> None:
        """Make a snapshot, unless it alone is more than may be kept."""
        if not state.length or kept_nbytes(state) > self.max_nbytes:
            return
        with self.lock:
            node = self._node_at(identity, state)
            if node.matrices is None:
                node.matrices = matrices_of(state)
                self.nbytes += pairs_nbytes(node.matrices)
            self.touch(node)
            self._shrink()

    def touch(self, node: Node) -> None:
        """It was used now."""
        self._clock += 1
        node.used = self._clock

    def clear(self) -> None:
        """Forget everything."""
        with self.lock:
            self.roots, self.nbytes = {}, 0

    def _nodes(self) -> Iterator[Node]:
        for root in self.roots.values():
            yield from root.below()

    def _walk(self, identity: str, tokens: Sequence[int]) -> tuple[Node, int]:
        """The last node whose tokens all are in `tokens`, and how many of one of its children's
        follow."""
        node = self.roots.setdefault(identity, Node((), [], None, 0))
        while (
            child := node.children.get(tokens[node.length]) if node.length < len(tokens) else None
        ):
            here = tokens[node.length : node.length + len(child.tokens)]
            if tuple(here) != child.tokens:
                pairs = zip(here, child.tokens, strict=False)
                same = next((n for n, (a, b) in enumerate(pairs) if a != b), len(here))
                return node, same
            node = child
        return node, 0

    def _node_at(self, identity: str, state: SequenceState) -> Node:
        """The node that ends where the state is, made if need be."""
        node, same = self._walk(identity, state.tokens)
        if same:
            node = self._split(node.children[state.tokens[node.length]], same)
        if node.length == state.length:
            return node
        new = tuple(state.tokens[node.length :])
        child = Node(new, rows_of(state, node.length), node, state.length)
        node.children[new[0]] = child
        self.nbytes += pairs_nbytes(child.rows)
        return child

    def _split(self, node: Node, place: int) -> Node:
        """Make two of a node; the first of them."""
        assert node.parent is not None
        before, after = split_rows(node.rows, place)
        front = Node(node.tokens[:place], before, node.parent, node.parent.length + place)
        front.children[node.tokens[place]] = node
        node.parent.children[front.tokens[0]] = front
        node.tokens, node.rows, node.parent = node.tokens[place:], after, front
        return front

    def _shrink(self) -> None:
        """Give up snapshots until the rest fits, and tokens that no snapshot needs."""
        if self.nbytes <= self.max_nbytes:
            return
        kept = [node for node in self._nodes() if node.matrices is not None]
        for node in sorted(kept, key=lambda node: node.used):
            self._forget(node)
            if self.nbytes <= self.max_nbytes:
                return

    def _forget(self, node: Node) -> None:
        self.nbytes -= pairs_nbytes(node.matrices or [])
        node.matrices = None
        while node.parent is not None and not node.children and node.matrices is None:
            self.nbytes -= pairs_nbytes(node.rows)
            del node.parent.children[node.tokens[0]]
            node = node.parent


class Prefix:
    """What one run has of a cache.

    Attributes:
        marks: lengths at which a snapshot is to be made while the prompt is read.
    """

    def __init__(
        self,
        cache: PrefixCache,
        identity: str,
        prompt: Sequence[int],
        end_ids: Collection[int],
        valid: Callable[[], bool],
    ) -> None:
        self._cache, self._identity, self._prompt, self._valid = cache, identity, prompt, valid
        ends = [place + 1 for place, token in enumerate(prompt) if token in end_ids]
        # A prompt without turns is likely to come again as a whole.
        turns = {ends[0], ends[-1]} if ends else {len(prompt) - 1}
        self.marks = turns | set(range(cache.spacing, len(prompt), cache.spacing))

    def restore(self, state: SequenceState) -> None:
        """Bring an empty state as far as is known."""
        with self._cache.lock:
            node = self._cache.longest(self._identity, self._prompt)
            if node is None or node.matrices is None:
                return
            self._cache.touch(node)
            path = node.path()
            tokens = [token for each in path for token in each.tokens]
            refill(state, tokens, [each.rows for each in path], node.matrices)

    def keep(self, state: SequenceState) -> None:
        """Make a snapshot of a state that went on from the prompt."""
        if self._valid():
            self._cache.add(self._identity, state)
