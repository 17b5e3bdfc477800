"""Stores: tables of what followed what, that draft without a model.

A store belongs to one tokenizer and one user: it holds fragments of what was read and written.
"""

from __future__ import annotations

import bisect
import hashlib
import heapq
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from isthmus.decoding.tree import TokenTree, Topology
from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError
from isthmus.roles import Shape

EMPTY = -1
"""Mark of a cell that holds no token."""


class AdjacencyStore:
    """For every token the k most likely successors seen last, int32 [V, k].

    Args:
        vocab_size: Tokens V.
        k: Successors kept.

    Attributes:
        table: int32 [V, k], best first, ``EMPTY`` where nothing was seen.

    Example:
        >>> store = AdjacencyStore(vocab_size=4, k=2)
        >>> store.update(np.array([1, 1]), np.array([[2, 3], [3, 0]]))
        >>> store.table[1].tolist(), store.table[0].tolist()
        ([3, 0], [-1, -1])
    """

    def __init__(self, vocab_size: int, k: int) -> None:
        if vocab_size < 1 or k < 1:
            raise InvalidInputError(f"a store needs vocab_size and k of at least 1, got {k}")
        self.table = np.full((vocab_size, min(k, vocab_size)), EMPTY, dtype=np.int32)

    def update(self, tokens: np.ndarray[Any, Any], successors: np.ndarray[Any, Any]) -> None:
        """Replace the rows of ``tokens`` [M] by ``successors`` [M, k]; the later one wins."""
        # NumPy assigns repeated indices in order, so the last one stays
        self.table[tokens] = successors

    def update_from_logits(self, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """Store the k most likely successors of each token [M] by its logits [M, V]."""
        k = self.table.shape[1]
        best = torch.topk(logits, k, dim=-1).indices
        self.update(tokens.cpu().numpy(), best.to("cpu", torch.int32).numpy())

    def fill(
        self,
        roots: np.ndarray[Any, Any],
        parents: np.ndarray[Any, Any],
        ranks: np.ndarray[Any, Any],
        levels: Sequence[np.ndarray[Any, Any]],
    ) -> np.ndarray[Any, Any]:
        """Look up a tree template level by level, one gather a level.

        Args:
            roots: int64 [B].
            parents: Parent of each node [N].
            ranks: Which successor of its parent each node is [N].
            levels: Node indices of each level below the root, top down.

        Returns:
            int64 [B, N], ``EMPTY`` where the table has no entry or the parent is empty.
        """
        tokens = np.full((len(roots), len(parents)), EMPTY, dtype=np.int64)
        tokens[:, 0] = roots
        for level in levels:
            above = tokens[:, parents[level]]
            found = self.table[above, ranks[level]]
            tokens[:, level] = np.where(above == EMPTY, EMPTY, found)
        return tokens


Successors = tuple[list[int], list[float]]
"""Tokens and their weights, best first."""

Lookup = Callable[[tuple[int, ...]], Successors]
"""From the last few tokens to what may follow them."""


def tokenizer_hash(tokenizer: Any) -> str:
    """Fingerprint of a tokenizer: equal text gives equal ids under equal fingerprints.

    Args:
        tokenizer: A tokenizer of transformers, or None where only token ids are known.

    Returns:
        Hexadecimal digits; the empty string for None.
    """
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text = json.dumps(sorted(tokenizer.get_vocab().items()))
    else:
        text = backend.to_str()
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class NGramStore:
    """What followed every n-gram of a text, most frequent first.

    The table is a corpus's and never changes; :class:`Adapted` learns on top of it.

    Args:
        vocab_size: Tokens V.
        order: Tokens of an entry: ``order - 1`` of context and the successor.
        tokenizer: Fingerprint of the tokenizer, see :func:`tokenizer_hash`.

    Attributes:
        contexts: Packed contexts, sorted, int64 [C].
        starts: First successor of each context, int64 [C + 1].
        tokens: Successors, int32 [E].
        weights: Share of each successor among all that followed its context, float32 [E].

    Raises:
        InvalidInputError: The order is below 2, or the vocabulary too large for it.

    Example:
        >>> store = NGramStore.build(np.array([1, 2, 3, 1, 2, 3, 1, 2, 0]), vocab_size=4)
        >>> tokens, weights = store.successors((1, 2))
        >>> tokens, [round(w, 2) for w in weights]
        ([3, 0], [0.67, 0.33])
    """

    def __init__(self, vocab_size: int, order: int = 3, tokenizer: str = "") -> None:
        if vocab_size < 1 or order < 2 or vocab_size**order >= 2**62:
            raise InvalidInputError(
                f"an n-gram store needs order 2 or more and vocab_size ** order below 2 ** 62, "
                f"got order {order} and vocab_size {vocab_size}"
            )
        self.vocab_size, self.order, self.tokenizer = vocab_size, order, tokenizer
        self.contexts = np.empty(0, dtype=np.int64)
        self.starts = np.zeros(1, dtype=np.int64)
        self.tokens = np.empty(0, dtype=np.int32)
        self.weights = np.empty(0, dtype=np.float32)
        self._known: dict[tuple[int, ...], Successors] = {}

    @classmethod
    def build(
        cls,
        ids: np.ndarray[Any, Any],
        vocab_size: int,
        *,
        order: int = 3,
        keep: int = 12,
        end: int | None = None,
        tokenizer: str = "",
    ) -> NGramStore:
        """Count a text.

        Args:
            ids: Token ids [T].
            vocab_size: Tokens V.
            order: As for the class.
            keep: Successors kept for every context.
            end: Token between two documents; nothing that touches it is counted.
            tokenizer: As for the class.

        Raises:
            InvalidInputError: A token is outside the vocabulary, or ``keep`` is below 1.
        """
        store = cls(vocab_size, order, tokenizer)
        if keep < 1:
            raise InvalidInputError(f"a store keeps at least 1 successor, got keep={keep}")
        ids = _checked(ids, vocab_size)
        n = len(ids) - order + 1
        if n < 1:
            return store
        key, clean = np.zeros(n, dtype=np.int64), np.ones(n, dtype=bool)
        for i in range(order):
            key = key * vocab_size + ids[i : i + n]
            clean &= ids[i : i + n] != (EMPTY if end is None else end)
        grams, counts = np.unique(key[clean], return_counts=True)
        above = grams // vocab_size
        # heaviest first inside each context; the smaller token among equals
        by_weight = np.lexsort((grams, -counts, above))
        above, grams, counts = above[by_weight], grams[by_weight], counts[by_weight]
        contexts, first, group = np.unique(above, return_index=True, return_inverse=True)
        total = np.bincount(group, weights=counts, minlength=len(contexts))
        kept = np.arange(len(above)) - first[group] < keep
        store.contexts = contexts
        sizes = np.bincount(group[kept], minlength=len(contexts))
        store.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        store.tokens = (grams[kept] % vocab_size).astype(np.int32)
        store.weights = (counts[kept] / total[group[kept]]).astype(np.float32)
        return store

    def successors(self, context: tuple[int, ...]) -> Successors:
        """What followed the last ``order - 1`` tokens of a context, best first."""
        context = context[-(self.order - 1) :] if len(context) >= self.order else context
        found = self._known.get(context)
        if found is None:
            found = self._known[context] = self._find(context)
            if len(self._known) > 200_000:  # what was asked for once need not be kept for ever
                self._known.clear()
        return found

    def _find(self, context: tuple[int, ...]) -> Successors:
        if len(context) < self.order - 1:
            return [], []
        key = 0
        for token in context:
            key = key * self.vocab_size + token
        at = int(np.searchsorted(self.contexts, key))
        if at == len(self.contexts) or self.contexts[at] != key:
            return [], []
        part = slice(int(self.starts[at]), int(self.starts[at + 1]))
        return self.tokens[part].tolist(), self.weights[part].tolist()

    def require(self, vocab_size: int) -> None:
        """Refuse to draft for a target of another vocabulary.

        Raises:
            MismatchError: The store counts tokens that the target does not have.
        """
        _require_vocabulary(self.vocab_size, vocab_size)

    def save(self, path: Path) -> None:
        """Write a safetensors file; an interrupted call leaves the old one whole."""
        _write(path, self, ("contexts", "starts", "tokens", "weights"), {"order": self.order})

    @classmethod
    def load(cls, path: Path, tokenizer: str) -> NGramStore:
        """Read a store back.

        Args:
            path: What :meth:`save` wrote.
            tokenizer: Fingerprint of the tokenizer it is to be used with.

        Raises:
            BrokenFileError: The file is missing, truncated or something else.
            MismatchError: It was built with another tokenizer.
        """
        header, arrays = _read(path, cls.__name__, tokenizer)
        store = cls(header["vocab_size"], header["order"], tokenizer)
        for name, array in arrays.items():
            setattr(store, name, array)
        entries, starts = len(store.tokens), store.starts
        whole = len(starts) == len(store.contexts) + 1 and len(store.weights) == entries
        whole = (
            whole and starts[0] == 0 and starts[-1] == entries and bool((np.diff(starts) > 0).all())
        )
        _require_whole(path, whole and _inside(store.tokens, store.vocab_size))
        return store


class Adapted:
    """A store as one user sees it: nudged by what was just read, the table itself untouched.

    Args:
        store: The corpus's table.
        gain: Added to the weight of an n-gram each time it is seen.
        cap: Largest weight; weights are scores and are not normalised again.
        keep: Successors that are shown.

    Example:
        >>> store = NGramStore.build(np.array([1, 2, 3]), vocab_size=4)
        >>> mine = Adapted(store, gain=0.5)
        >>> mine.nudge([1, 2, 0])
        >>> mine.successors((1, 2)), store.successors((1, 2))
        (([3, 0], [1.0, 0.5]), ([3], [1.0]))
    """

    def __init__(
        self, store: NGramStore, *, gain: float = 0.04, cap: float = 3.0, keep: int = 12
    ) -> None:
        self.store, self.gain, self.cap, self.keep = store, gain, cap, keep
        self._mine: dict[tuple[int, ...], dict[int, float]] = {}
        self._shown: dict[tuple[int, ...], Successors] = {}

    def nudge(self, ids: Sequence[int]) -> None:
        """Raise the weight of every n-gram of ids [T] by ``gain``, up to ``cap``."""
        size = self.store.order - 1
        for i in range(len(ids) - size):
            context, token = tuple(ids[i : i + size]), ids[i + size]
            mine = self._mine.get(context)
            if mine is None:
                mine = self._mine[context] = dict(zip(*self.store.successors(context), strict=True))
            mine[token] = max(mine.get(token, 0.0), min(self.cap, mine.get(token, 0.0) + self.gain))
            self._shown.pop(context, None)

    def successors(self, context: tuple[int, ...]) -> Successors:
        """What may follow a context, best first, as nudged so far."""
        mine = self._mine.get(context)
        if mine is None:
            return self.store.successors(context)
        shown = self._shown.get(context)
        if shown is None:
            best = sorted(mine, key=lambda t: -mine[t])[: self.keep]
            shown = self._shown[context] = best, [mine[t] for t in best]
        return shown


class SuffixStore:
    """A text and its suffix array: where did the last few tokens stand before?

    Args:
        ids: Token ids [T].
        vocab_size: Tokens V.
        reach: Longest suffix that can be looked up.
        end: Token between two documents; no continuation crosses it.
        tokenizer: Fingerprint of the tokenizer, see :func:`tokenizer_hash`.

    Attributes:
        ids: int32 [T].
        order: Positions sorted by the ``reach`` or more tokens that begin there, int32 [T].

    Raises:
        InvalidInputError: A token is outside the vocabulary, or the text is too long.

    Example:
        >>> store = SuffixStore(np.array([1, 2, 3, 9, 1, 2, 4, 9, 1, 2, 3]), vocab_size=10)
        >>> store.search([7, 1, 2])
        (2, [2, 6, 10])
        >>> store.continuations([7, 1, 2], length=1)
        (2, {(3,): 2, (4,): 1})
    """

    def __init__(
        self,
        ids: np.ndarray[Any, Any],
        vocab_size: int,
        *,
        reach: int = 16,
        end: int | None = None,
        tokenizer: str = "",
    ) -> None:
        if vocab_size < 1 or reach < 1 or len(ids) >= 2**31:
            raise InvalidInputError(
                "a suffix store needs vocab_size and reach of at least 1 and fewer than 2 ** 31 "
                f"tokens, got {vocab_size}, {reach} and {len(ids)} tokens"
            )
        self.vocab_size, self.reach, self.tokenizer = vocab_size, reach, tokenizer
        self.end = EMPTY if end is None else end
        self.ids = _checked(ids, vocab_size).astype(np.int32)
        self.order = _suffix_array(self.ids, vocab_size, reach)

    def _interval(self, suffix: list[int]) -> tuple[int, int]:
        """The part of ``order`` whose texts begin with the suffix."""
        size = len(suffix)

        def prefix(rank: int) -> list[int]:
            at = int(self.order[rank])
            out: list[int] = self.ids[at : at + size].tolist()
            return out

        ranks = range(len(self.order))
        low = bisect.bisect_left(ranks, suffix, key=prefix)
        return low, bisect.bisect_right(ranks, suffix, lo=low, key=prefix)

    def search(
        self, context: Sequence[int], *, shortest: int = 2, limit: int = 64
    ) -> tuple[int, list[int]]:
        """Find the longest suffix of a context that the text holds.

        Args:
            context: Token ids; the last ``reach`` are looked at.
            shortest: Shortest suffix that counts as a match.
            limit: Positions returned at most, spread evenly over all matches.

        Returns:
            Length of the match, and the positions right after it; (0, []) without a match.
        """
        tail = list(context[-self.reach :])
        best, interval = 0, (0, 0)
        low, high = shortest, len(tail)
        while low <= high:  # what holds a suffix holds every shorter one too
            size = (low + high) // 2
            found = self._interval(tail[-size:])
            if found[1] > found[0]:
                best, interval, low = size, found, size + 1
            else:
                high = size - 1
        first, last = interval
        count = min(limit, last - first)
        if not count:
            return 0, []
        chosen = first + np.arange(count) * (last - first) // count
        positions: list[int] = np.sort(self.order[chosen] + best).tolist()
        return best, positions

    def continuations(
        self, context: Sequence[int], *, length: int = 10, shortest: int = 2, limit: int = 64
    ) -> tuple[int, dict[tuple[int, ...], int]]:
        """What followed the longest known suffix of a context.

        Args:
            context: Token ids.
            length: Tokens of a continuation at most.
            shortest: As for :meth:`search`.
            limit: As for :meth:`search`.

        Returns:
            Length of the match, and how often each continuation followed it.
        """
        size, positions = self.search(context, shortest=shortest, limit=limit)
        found: dict[tuple[int, ...], int] = {}
        for at in positions:
            tokens = self.ids[at : at + length].tolist()
            if self.end in tokens:
                tokens = tokens[: tokens.index(self.end)]
            if tokens:
                found[tuple(tokens)] = found.get(tuple(tokens), 0) + 1
        return size, found

    def require(self, vocab_size: int) -> None:
        """Refuse to draft for a target of another vocabulary.

        Raises:
            MismatchError: The store counts tokens that the target does not have.
        """
        _require_vocabulary(self.vocab_size, vocab_size)

    def save(self, path: Path) -> None:
        """Write a safetensors file; an interrupted call leaves the old one whole."""
        _write(path, self, ("ids", "order"), {"reach": self.reach, "end": self.end})

    @classmethod
    def load(cls, path: Path, tokenizer: str) -> SuffixStore:
        """Read a store back.

        Args:
            path: What :meth:`save` wrote.
            tokenizer: Fingerprint of the tokenizer it is to be used with.

        Raises:
            BrokenFileError: The file is missing, truncated or something else.
            MismatchError: It was built with another tokenizer.
        """
        header, arrays = _read(path, cls.__name__, tokenizer)
        nothing = np.empty(0, dtype=np.int32)
        store = cls(nothing, header["vocab_size"], reach=header["reach"], tokenizer=tokenizer)
        store.end, store.ids, store.order = header["end"], arrays["ids"], arrays["order"]
        whole = len(store.ids) == len(store.order) and _inside(store.order, len(store.ids))
        _require_whole(path, whole and _inside(store.ids, store.vocab_size))
        return store


class Trie:
    """A tree of one row that grows path by path and never beyond a shape.

    Args:
        root: The last committed token.
        shape: Limits.

    Example:
        >>> trie = Trie(7, Shape(nodes=4, depth=2))
        >>> [trie.add(path) for path in ([1, 2, 3], [1, 5], [1, 2], [4])]
        [2, 1, 0, 1]
        >>> print(trie.tree().to_ascii())
        7
        ├─ 1
        │  ├─ 2
        │  └─ 5
        └─ 4
    """

    def __init__(self, root: int, shape: Shape) -> None:
        self.shape = shape
        self.tokens, self.parents = [root], [-1]
        self._children: list[dict[int, int]] = [{}]

    def child(self, node: int, token: int) -> int | None:
        """The child of a node with that token, made if there is room; None where there is not."""
        children = self._children[node]
        if token not in children:
            full = len(self.tokens) > self.shape.nodes or len(children) >= self.shape.width
            if full:
                return None
            children[token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(node)
            self._children.append({})
        return children[token]

    def add(self, path: Sequence[int]) -> int:
        """Add as much of a path below the root as there is room for; returns the new nodes."""
        before, node = len(self.tokens), 0
        for token in path[: self.shape.depth]:
            below = self.child(node, token)
            if below is None:
                break
            node = below
        return len(self.tokens) - before

    def tree(self) -> TokenTree:
        """The tree, nodes in the order in which they came."""
        return TokenTree(torch.tensor([self.tokens]), Topology.of(self.parents))


def likeliest_tree(lookup: Lookup, context: tuple[int, ...], shape: Shape) -> Trie:
    """The most likely tree that a store can draw: always expand the likeliest path so far.

    The likelihood of a path is the product of its weights, each divided by the weights of all
    successors beside it where those exceed 1.

    Args:
        lookup: Successors of the last tokens, for example ``NGramStore.successors``.
        context: The last tokens, as many as the lookup looks at; the last one is the root.
        shape: Limits.

    Example:
        >>> store = NGramStore.build(np.array([1, 2, 3, 1, 2, 3, 1, 2, 0]), vocab_size=4)
        >>> likeliest_tree(store.successors, (1, 2), Shape(nodes=3, depth=3)).tokens
        [2, 3, 1, 2]
    """
    trie = Trie(context[-1], shape)
    # the number of the entry decides between equals, so that the tree is the same everywhere
    heap: list[tuple[float, int, int, int, int, tuple[int, ...]]] = []
    entries = itertools.count()

    def expand(node: int, depth: int, score: float, at: tuple[int, ...]) -> None:
        if depth == shape.depth:
            return
        tokens, weights = lookup(at)
        whole = max(1.0, sum(weights))
        for token, weight in zip(tokens[: shape.width], weights, strict=False):
            item = (-score * weight / whole, next(entries), node, depth + 1, token, at)
            heapq.heappush(heap, item)

    expand(0, 0, 1.0, context)
    while heap and len(trie.tokens) <= shape.nodes:
        negative, _, parent, depth, token, at = heapq.heappop(heap)
        node = trie.child(parent, token)
        if node is not None:
            expand(node, depth, -negative, (*at[1:], token))
    return trie


def _checked(ids: np.ndarray[Any, Any], vocab_size: int) -> np.ndarray[Any, Any]:
    ids = np.asarray(ids, dtype=np.int64)
    if ids.ndim != 1 or not _inside(ids, vocab_size):
        raise InvalidInputError(
            f"a store is built from one row of token ids below {vocab_size}; is the tokenizer the "
            "model's own?"
        )
    return ids


def _inside(ids: np.ndarray[Any, Any], size: int) -> bool:
    return not len(ids) or bool(ids.min() >= 0 and ids.max() < size)


def _suffix_array(ids: np.ndarray[Any, Any], vocab_size: int, reach: int) -> np.ndarray[Any, Any]:
    """Positions sorted by the ``reach`` or more tokens that begin there (prefix doubling)."""
    n = len(ids)
    # as many tokens as fit a 62-bit number are compared at once; 0 stands for the end of the text
    span = max(1, min(reach, 62 // (vocab_size + 1).bit_length()))
    padded = np.concatenate([ids.astype(np.int64) + 1, np.zeros(span, dtype=np.int64)])
    key = np.zeros(n, dtype=np.int64)
    for i in range(span):
        key = key * (vocab_size + 1) + padded[i : i + n]
    while True:
        order = np.argsort(key, kind="stable")
        if span >= reach or n < 2:
            return order.astype(np.int32)
        rank = np.empty(n, dtype=np.int64)
        rank[order] = np.concatenate([[0], np.cumsum(np.diff(key[order]) != 0)])
        if int(rank[order[-1]]) == n - 1:  # all unlike: longer keys would not change the order
            return order.astype(np.int32)
        after = np.zeros(n, dtype=np.int64)
        after[: max(0, n - span)] = rank[span:] + 1
        key, span = rank * (n + 1) + after, 2 * span


def _write(path: Path, store: Any, names: Sequence[str], header: dict[str, int]) -> None:
    values = {**header, "vocab_size": store.vocab_size, "tokenizer": store.tokenizer}
    values["kind"] = type(store).__name__
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.ascontiguousarray(getattr(store, name)) for name in names}
        save_file(arrays, part, metadata={"isthmus": json.dumps(values)})
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise BrokenFileError(f"cannot write {str(path)!r}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def _read(
    path: Path, kind: str, tokenizer: str
) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    try:
        with safe_open(path, "np") as file:
            header = json.loads(file.metadata()["isthmus"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header["kind"] != kind:
            raise BrokenFileError(f"{str(path)!r} holds a {header['kind']}, not a {kind}")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BrokenFileError(
            f"{str(path)!r} is no store, or a damaged one ({error}); delete it to build it again"
        ) from error
    if header["tokenizer"] != tokenizer:
        raise MismatchError(
            f"the store {str(path)!r} was built with another tokenizer; build one for this model"
        )
    return header, arrays


def _require_whole(path: Path, whole: bool) -> None:
    if not whole:
        raise BrokenFileError(f"{str(path)!r} is a damaged store; delete it to build it again")


def _require_vocabulary(own: int, target: int) -> None:
    if own != target:
        raise MismatchError(
            f"the store is of a vocabulary of {own} tokens and the target has {target}; build one "
            "with the target's tokenizer"
        )
