"""Constraints: JSON Schemas, regular expressions, grammars and choices that an answer keeps to.

A :class:`Spec` says what is wanted and a :class:`Compiler` turns it into a :class:`Grammar` for one
vocabulary; llguidance (the extra ``constrain``) does the parsing. Strict is the default: what
cannot be held exactly is refused with the reason, and only a schema that is asked for as
``lenient`` may be held in part; its answers are then judged by jsonschema.
:mod:`isthmus.decoding.constrained` makes a law of it.

Where the text admits no choice, its canonical tokens are the law (``Spec.canonical``): the text is
the same, the model sees the tokens it was trained on, and a draft of them always stands.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from isthmus.decoding.bytevocab import ByteVocab
from isthmus.errors import BrokenFileError, InvalidInputError, IsthmusError, require

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Kind = Literal["json_schema", "regex", "grammar"]

KEPT = 64
"""Compiled grammars that a compiler remembers."""


NEGATED = re.compile(r"\[\^((?:\\.|[^\]\\])*)\]")
"""A character class of a regular expression that says what is not in it."""


class UnsupportedConstraint(InvalidInputError):  # noqa: N818
    """A constraint that cannot be held exactly, or not at all; the message has the reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"this constraint cannot be held: {reason}")


class DeadEnd(IsthmusError):  # noqa: N818
    """No token may follow, and the answer is not complete."""


@dataclass(frozen=True)
class Spec:
    """What is asked for, before it is compiled; see the functions below.

    Attributes:
        kind: Language of ``text``.
        text: The schema as JSON, the expression, or the grammar.
        lenient: Schemas only: hold what can be held.
        spaced: Schemas only: ``", "`` and ``": "`` between values instead of ``","`` and ``":"``.
        canonical: Where the text admits no choice, only its canonical tokens are allowed.
    """

    kind: Kind
    text: str
    lenient: bool = False
    spaced: bool = False
    canonical: bool = True

    @property
    def hash(self) -> str:
        """Fingerprint of the whole."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


def json_schema(
    schema: Mapping[str, Any] | bool | str | Path, *, lenient: bool = False, spaced: bool = False
) -> Spec:
    """JSON that validates under a schema.

    Args:
        schema: The schema itself, its text, or the path of its file.
        lenient: Hold what can be held of a schema that cannot be held exactly.
        spaced: ``", "`` and ``": "`` between values; by default there is no whitespace at all, for
            unlimited whitespace lets a model write nothing else.

    Raises:
        BrokenFileError: The file cannot be read.
        InvalidInputError: It is not JSON, or neither an object nor a boolean.

    Example:
        >>> json_schema('{"type": "integer"}').text
        '{"type": "integer"}'
    """
    value: Any = schema
    if isinstance(schema, (str, Path)):
        text = str(schema)
        if not text.lstrip().startswith(("{", "true", "false")):
            text = _read(Path(schema))
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidInputError(f"the JSON Schema is not JSON: {error}") from error
    if not isinstance(value, (Mapping, bool)):
        raise InvalidInputError(
            f"a JSON Schema is an object or a boolean, got {type(value).__name__}"
        )
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"the JSON Schema holds what JSON cannot: {error}") from error
    return Spec("json_schema", text, lenient, spaced)


def json_object(*, spaced: bool = False) -> Spec:
    """Any JSON object."""
    return json_schema({"type": "object"}, spaced=spaced)


def regex(pattern: str) -> Spec:
    """Text that a regular expression matches as a whole; no look-around, no back-references."""
    return Spec("regex", pattern)


def grammar(source: str | Path) -> Spec:
    """Text of a context-free grammar in the Lark dialect of llguidance, with the rule ``start``.

    Args:
        source: The grammar, or the path of its file.

    Raises:
        BrokenFileError: The file cannot be read.
    """
    text = _read(source) if isinstance(source, Path) else source
    return Spec("grammar", text)


def choice(options: Sequence[str]) -> Spec:
    """One of several texts.

    Raises:
        InvalidInputError: There is none, or one is empty.

    Example:
        >>> choice(["yes", "no"]).text
        'yes|no'
    """
    if isinstance(options, str) or not options or not all(options):
        raise InvalidInputError("a choice needs a list of one or more texts, none of them empty")
    return Spec("regex", "|".join(re.escape(option) for option in options))


def as_spec(constraint: Spec | Mapping[str, Any] | bool) -> Spec:
    """A spec as it is; anything else is read as a JSON Schema."""
    return constraint if isinstance(constraint, Spec) else json_schema(constraint)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenFileError(f"{path} cannot be read as text ({error})") from error


def narrowed(schema: Any) -> Any:
    r"""A schema whose patterns do not let quotes and backslashes slip through.

    llguidance 1.9 writes an escaped quote for ``[^"]``, as long as control characters are in the
    class. So they are taken out: such strings hold none, which is narrower, never wrong.

    Example:
        >>> narrowed({"pattern": '^[^"]+$'})["pattern"]
        '^[^"\\x00-\\x1f]+$'
    """
    if isinstance(schema, list):
        return [narrowed(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    out = {}
    for name, value in schema.items():
        if name in ("const", "enum", "default", "examples"):
            out[name] = value
        elif name == "pattern" and isinstance(value, str):
            out[name] = _narrowed(value)
        elif name == "patternProperties" and isinstance(value, Mapping):
            out[name] = {_narrowed(key): narrowed(one) for key, one in value.items()}
        elif name in ("properties", "$defs", "definitions") and isinstance(value, Mapping):
            out[name] = {key: narrowed(one) for key, one in value.items()}  # keys are no keywords
        else:
            out[name] = narrowed(value)
    return out


def _narrowed(pattern: str) -> str:
    def close(found: re.Match[str]) -> str:
        body = found[1]
        risky = '"' in body or "\\\\" in body
        return f"[^{body}\\x00-\\x1f]" if risky else found[0]

    return NEGATED.sub(close, pattern)


class State:
    """A place in a constrained text; a value: moving on makes a new one.

    Attributes:
        alive: False after a token that was not allowed.
    """

    alive = True

    def __init__(self, grammar: Grammar, matcher: LLMatcher) -> None:
        self.grammar, self._matcher = grammar, matcher
        self._after: dict[int, State] = {}  # a round asks several times for the same node

    def advance(self, token: int) -> State:
        """The state after one more token."""
        after = self._after.get(token)
        if after is None:
            after = self._after[token] = self._advance(token)
        return after

    def _advance(self, token: int) -> State:
        if self.mask is None:
            return FREE
        if not 0 <= token < self.grammar.size or not self.mask[token // 32] >> token % 32 & 1:
            return DEAD
        if token in self.grammar.ends:
            return FREE
        matcher = self._matcher.deep_copy()
        matcher.consume_token(token)
        return State(self.grammar, matcher)

    def rollback(self, count: int) -> State:
        """The state ``count`` tokens ago."""
        matcher = self._matcher.deep_copy()
        matcher.rollback(count)
        return State(self.grammar, matcher)

    @property
    def accepting(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting() and not self._matcher.is_error()

    @property
    def complete(self) -> bool:
        """Whether the text has to end here."""
        return self._matcher.is_stopped() and self.accepting

    @cached_property
    def forced(self) -> tuple[int, ...]:
        """Canonical tokens of the text that admits no choice, the end token where that is all."""
        if self.complete:
            return self.grammar.ends if len(self.grammar.ends) == 1 else ()
        return tuple(self._matcher.compute_ff_tokens())

    @cached_property
    def mask(self) -> NDArray[np.uint32] | None:
        """Tokens that may follow, a bit each, uint32 [W]; the end tokens' are set if accepting.

        Where no token may follow and the text may not end either, only end tokens may: the answer
        ends, and :class:`Ending` says that it is broken. None beyond the end.
        """
        grammar = self.grammar
        if self.complete and not grammar.ends:
            return None
        if grammar.canonical and self.forced:
            return grammar.bits(self.forced[:1])
        bits: NDArray[np.uint32] = np.zeros(grammar.words, dtype=np.uint32)
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._matcher.is_error() or not bits.any():
            return grammar.bits(grammar.ends)
        return bits


class _Beyond(State):
    """After the end, or after a token that is not allowed: nothing is masked any more."""

    forced: Any = ()
    mask: Any = None
    accepting = complete = False

    def __init__(self, alive: bool) -> None:
        self.alive = alive

    def advance(self, token: int) -> State:
        """Still beyond."""
        return self


FREE, DEAD = _Beyond(alive=True), _Beyond(alive=False)


class Grammar:
    """A compiled constraint; see :class:`isthmus.roles.Constraint`.

    Attributes:
        spec: What was asked for.
        exact: Whether all of it is held; False only for lenient schemas.
        unheld: Why it is not exact.
        size: Tokens V of the vocabulary.
        ends: End tokens.
    """

    def __init__(
        self,
        spec: Spec,
        matcher: LLMatcher,
        tokenizer: LLTokenizer,
        ends: tuple[int, ...],
        unheld: str = "",
    ) -> None:
        size = tokenizer.vocab_size - 1
        self.spec, self.size, self.ends, self.unheld = spec, size, ends, unheld
        self._tokenizer = tokenizer
        self.exact, self.canonical = not unheld, spec.canonical
        self.words = size // 32 + 1  # one bit more than there are tokens: llguidance's own end
        self._matcher = matcher

    def bits(self, tokens: Sequence[int]) -> NDArray[np.uint32]:
        """A mask of the given tokens, uint32 [W]."""
        out: NDArray[np.uint32] = np.zeros(self.words, dtype=np.uint32)
        for token in tokens:
            out[token // 32] |= np.uint32(1 << token % 32)
        return out

    def start(self) -> State:
        """The state before the first token."""
        return State(self, self._matcher.deep_copy())

    def advance(self, state: State, token: int) -> State:
        """The state after one more token; the given one stays as it is."""
        return state.advance(token)

    def rollback(self, state: State, count: int) -> State:
        """The state ``count`` tokens ago."""
        return state.rollback(count)

    def accepting(self, state: State) -> bool:
        """Whether the text may end."""
        return state.accepting

    def forced(self, state: State) -> tuple[int, ...]:
        """Tokens that follow whatever the model says."""
        return state.forced

    def mask(self, states: Sequence[State]) -> torch.Tensor:
        """Tokens that may follow each state, int32 [R, W], a bit each; all where it is beyond."""
        every = np.full(self.words, 0xFFFFFFFF, dtype=np.uint32)
        rows = [every if state.mask is None else state.mask for state in states]
        return torch.from_numpy(np.stack(rows).view(np.int32))

    def mask_tree(
        self, state: State, tokens: Sequence[int], parents: Sequence[int]
    ) -> torch.Tensor:
        """Masks of all nodes of a tree whose root has the given state, int32 [N, W].

        Args:
            state: State of node 0, its token included.
            tokens: Tokens of the nodes; the root's is not read.
            parents: Parent of each node, -1 for the root; parents come first.
        """
        states = [state]
        for token, parent in zip(tokens[1:], parents[1:], strict=True):
            states.append(states[parent].advance(token))
        return self.mask(states)

    def accepts(self, text: str) -> bool:
        """Whether a whole text is allowed, whatever its tokens."""
        matcher = self._matcher.deep_copy()
        tokens = self._tokenizer.tokenize_bytes(text.encode())
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    def judge(self, text: str) -> str:
        """What jsonschema has against an answer under a lenient schema; empty where nothing.

        Raises:
            MissingExtraError: jsonschema is not installed.
        """
        if self.exact or self.spec.kind != "json_schema":
            return ""
        return validation_error(self.spec.text, text)


def validation_error(schema: str, text: str) -> str:
    """What jsonschema has against a text under a schema, formats included; empty where nothing.

    Raises:
        MissingExtraError: jsonschema is not installed.
    """
    jsonschema = require("jsonschema", "constrain")
    schema_value = json.loads(schema)
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"it is not JSON: {error}"
    kind = jsonschema.validators.validator_for(
        schema_value, default=jsonschema.Draft202012Validator
    )
    validator = kind(schema_value, format_checker=kind.FORMAT_CHECKER)
    fault = jsonschema.exceptions.best_match(validator.iter_errors(value))
    return "" if fault is None else str(fault.message)


class Compiler:
    """Compiles constraints for one vocabulary and remembers them.

    Args:
        vocab: Bytes under the tokens.
        size: Tokens V of the target, padding beyond the tokenizer's included.
        ends: End tokens of the model; they are allowed exactly where the text may end.

    Raises:
        MissingExtraError: llguidance is not installed.
    """

    def __init__(self, vocab: ByteVocab, size: int, ends: Sequence[int] = ()) -> None:
        self._llguidance: Any = require("llguidance", "constrain")
        self.size, self.ends = size, tuple(ends)
        known = [vocab.bytes(token) for token in range(size)]
        self.tokenizer: LLTokenizer = self._llguidance.LLTokenizer(
            _Words(vocab, known, self.ends), n_vocab=size + 1, eos_token=[size, *self.ends]
        )
        self._made: OrderedDict[str, Grammar] = OrderedDict()

    def compile(self, spec: Spec) -> Grammar:
        """The constraint, compiled now or before.

        Raises:
            UnsupportedConstraint: It is no valid constraint, admits nothing, or cannot be held.
        """
        key = spec.hash
        if key in self._made:
            self._made.move_to_end(key)
            return self._made[key]
        try:
            made = self._compile(spec)
        except UnsupportedConstraint as error:
            if not spec.lenient:
                raise
            made = self._compile(spec, unheld=error.reason)
            require("jsonschema", "constrain")  # the judge; better missed now than at the end
        self._made[key] = made
        if len(self._made) > KEPT:
            self._made.popitem(last=False)
        return made

    def _compile(self, spec: Spec, unheld: str = "") -> Grammar:
        matchers: Any = self._llguidance.LLMatcher
        if spec.kind == "json_schema":
            options = {
                "whitespace_flexible": False,
                "item_separator": ", " if spec.spaced else ",",
                "key_separator": ": " if spec.spaced else ":",
                "lenient": bool(unheld),
                "coerce_one_of": bool(unheld),
            }
            schema = json.loads(spec.text)
            if schema is False:
                raise UnsupportedConstraint("no value validates under the schema false")
            schema = {} if schema is True else json.dumps(narrowed(schema))
            text = matchers.grammar_from_json_schema(schema, overrides=options)
        elif spec.kind == "regex":
            text = matchers.grammar_from_regex(spec.text)
        else:
            text = matchers.grammar_from_lark(spec.text)
        matcher = matchers(self.tokenizer, text, log_level=0)
        if matcher.is_error():
            raise UnsupportedConstraint(_first_line(matcher.get_error()))
        grammar = Grammar(spec, matcher, self.tokenizer, self.ends, unheld)
        first = grammar.start()
        allowed = first.mask
        if allowed is not None and not first.accepting and not _beyond(allowed, grammar).any():
            raise UnsupportedConstraint("no text of this vocabulary begins it")
        return grammar


class _Words:
    """The vocabulary as llguidance reads it."""

    def __init__(self, vocab: ByteVocab, known: list[bytes | None], ends: tuple[int, ...]) -> None:
        self._vocab = vocab
        size = len(known)
        self.eos_token_id, self.bos_token_id = size, None
        self.tokens = [b"<%d>" % i if b is None else b for i, b in enumerate([*known, None])]
        special = {i for i, b in enumerate(known) if b is None} | {*ends, size}
        self.special_token_ids = sorted(special)
        self.is_tokenizer_wrapper = True

    def __call__(self, text: str | bytes) -> list[int]:
        """Canonical tokens of a text in the middle of another."""
        return self._vocab.encode(text.encode() if isinstance(text, str) else text)


def _beyond(allowed: NDArray[np.uint32], grammar: Grammar) -> NDArray[np.uint32]:
    """What a mask allows besides end tokens."""
    return allowed & ~grammar.bits(grammar.ends)


def _first_line(message: str) -> str:
    """The gist of an error of llguidance, which may quote the whole grammar."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error:")]
    text = told[-1].removeprefix("error:").strip() if told else (lines or ["unknown"])[0]
    return text[:300]
