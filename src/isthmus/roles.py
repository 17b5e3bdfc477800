"""The grammar: the roles that parts play in decoding, one Protocol each.

A system is a part that plays one of these roles. Shapes are written with the house letters:
B batch, N draft nodes (node 0 is the root), S cache slots, V vocabulary, D depth. Everything here
is structural: no part inherits from a role, ``isthmus.testing`` checks that it keeps it.

The loop in :mod:`isthmus.decoding.engine` is
``propose -> score -> accept -> commit -> observe`` and knows only these names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from isthmus.codecs.container import Frame, Header
    from isthmus.decoding.tree import TokenTree
    from isthmus.surgery import base
    from isthmus.surgery.calibration import Calibration

Reach = Literal["tree", "chain", "step"]
"""What a target scores exactly in one forward: any tree, a chain only, or one token."""

Stage = Literal["combine", "mask", "truncate"]
"""When a reshape has its turn. One step is always: combine models on raw logits; penalties and
processors; masks of constraints; temperature; truncation; then the pick. Masks come before
truncation, so that a legal token always survives."""


@dataclass(frozen=True)
class Shape:
    """How much a policy allows to be drafted in one round.

    Attributes:
        nodes: Draft nodes at most, the root not counted. 0 is plain decoding.
        depth: Levels below the root at most.
        width: Children of one node at most; 1 asks for a chain.
    """

    nodes: int
    depth: int
    width: int = 1_000_000

    def capped(self, nodes: int, depth: int, width: int = 1_000_000) -> Shape:
        """Return this shape with every limit lowered to the given ones (never below 0)."""
        return Shape(
            max(0, min(self.nodes, nodes)),
            max(0, min(self.depth, depth)),
            max(1, min(self.width, width)),
        )


PLAIN = Shape(nodes=0, depth=0)
"""Draft nothing: plain decoding."""


@dataclass(frozen=True)
class Taps:
    """Which inner states of the target a drafter or an acceptance rule reads.

    Attributes:
        final: The last hidden state, after the final norm: what the LM head multiplies.
        layers: Decoder layers whose *incoming* hidden state is read, 0 to L; L is the state that
            leaves the last layer, before the final norm.
        cross_attention: The weights of every decoder layer over the encoder's output, of models
            with an encoder.
    """

    final: bool = False
    layers: tuple[int, ...] = ()
    cross_attention: bool = False

    def __bool__(self) -> bool:
        return self.final or bool(self.layers) or self.cross_attention

    def __or__(self, other: Taps) -> Taps:
        """Everything that either asks for."""
        layers = tuple(sorted({*self.layers, *other.layers}))
        across = self.cross_attention or other.cross_attention
        return Taps(self.final or other.final, layers, across)


@dataclass(frozen=True)
class Features:
    """Inner states of the target at N tokens of each row.

    Attributes:
        final: [B, N, D], or None where not asked for.
        layers: [B, N, D] by layer, as :class:`Taps` numbers them.
        cross_attention: Weights over S source tokens [B, N, L, H, S], or None where not asked for.
    """

    final: torch.Tensor | None = None
    layers: dict[int, torch.Tensor] = field(default_factory=dict)
    cross_attention: torch.Tensor | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Features:
        """The same states after one change, such as a choice of rows or tokens."""
        final, across = (
            None if x is None else change(x) for x in (self.final, self.cross_attention)
        )
        return Features(final, {i: change(x) for i, x in self.layers.items()}, across)


@dataclass
class Context:
    """What a drafter and a policy may look at before a draft is drawn.

    Attributes:
        ids: Committed tokens of every row, int64 [B, >= max(lengths)]; the last committed token of
            row b, ``ids[b, lengths[b] - 1]``, is the root of the next tree. On the CPU.
        lengths: Committed tokens in each row, prompt included.
        prompt_lengths: Prompt tokens in each row.
        law: The sampling law of this request; a drafter that samples draws from its own logits
            through the same law.
        generator: Source of every random draw.
        requests: Which request each row serves; rows leave the batch as they finish, and others
            may take their place.
        noise: Set under coupled acceptance: ``noise(request, position, vocab_size)`` gives the
            Gumbel noise [V] that decides the token at that position, shared by drafter and target.
        features: The target's inner states of its last forward, where somebody taps them: at
            ``begin`` those of the prompt without its root, padded at the end; afterwards those of
            the tree that was just scored. None at ``extend``.
        session: The target at work, for drafters that read its cache.
    """

    ids: torch.Tensor
    lengths: list[int]
    prompt_lengths: list[int]
    law: Law
    generator: torch.Generator
    requests: list[int]
    noise: Callable[[int, int, int], torch.Tensor] | None = None
    features: Features | None = None
    session: Session | None = None

    @property
    def batch(self) -> int:
        """Rows in this round."""
        return len(self.lengths)

    def row(self, b: int) -> torch.Tensor:
        """Committed tokens of row b, int64 [lengths[b]]."""
        return self.ids[b, : self.lengths[b]]

    def roots(self) -> torch.Tensor:
        """The last committed token of every row, int64 [B]."""
        last = [[n - 1] for n in self.lengths]
        return self.ids.gather(1, self.ids.new_tensor(last))[:, 0]


@dataclass
class Verdict:
    """What an acceptance rule decided about one tree.

    Attributes:
        path: Accepted node of each level, the root first, int64 [B, <= depth + 1], padded with -1.
        token: The token that the target itself supplies at the end, int64 [B].
    """

    path: torch.Tensor
    token: torch.Tensor


@dataclass
class Step:
    """One finished round, as drafters and policies observe it.

    Attributes:
        tree: The tree that was scored.
        logits: Raw target logits at every node [B, N, V]; empty where nobody reads them.
        verdict: Accepted path and final token, before truncation by stop rules.
        accepted: Draft tokens accepted in each row.
        context: The context after commit (``ids`` and ``lengths`` include the new tokens).
        shape: The shape that the policy had asked for.
        draft_s: Seconds spent in ``propose``.
        score_s: Seconds spent in the target's forward.
        features: The target's inner states at every node, where somebody taps them.
    """

    tree: TokenTree
    logits: torch.Tensor
    verdict: Verdict
    accepted: list[int]
    context: Context
    shape: Shape
    draft_s: float = 0.0
    score_s: float = 0.0
    features: Features | None = None


@dataclass(frozen=True)
class Scores:
    """What a target says about a tree.

    Attributes:
        logits: Law of the child of each node, before any processing, [B, N, V].
        features: Inner states at each node, when asked for.
        choice: First of the largest logits at each node, int64 [B, N], where that alone was asked
            for; then ``logits`` is empty.
    """

    logits: torch.Tensor
    features: Features | None = None
    choice: torch.Tensor | None = None


@runtime_checkable
class Session(Protocol):
    """A target at work on B rows: committed tokens are cached, the root of each row is not."""

    @property
    def lengths(self) -> list[int]:
        """Cached tokens of each row."""
        ...

    def prefill(self, rows: Sequence[torch.Tensor], *, taps: Taps | None = None) -> Features | None:
        """Cache the given tokens, one int64 [T_b] tensor a row, after what is cached already.

        Returns:
            The tapped states of these tokens, padded at the end; None without taps.
        """
        ...

    def score(self, tree: TokenTree, *, taps: Taps | None = None) -> Scores:
        """Run the target on a tree (root included) without committing any of it."""
        ...

    def keep(self, path: torch.Tensor) -> None:
        """Commit one path of the last scored tree, int64 [B, M] node indices padded with -1."""
        ...

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget cached tokens beyond the given lengths."""
        ...

    def fork(self, rows: Sequence[int]) -> Session:
        """Return a session that holds copies of the given rows, in that order."""
        ...

    def join(self, other: Session) -> Session:
        """Return a session of the same target that holds copies of the rows of both, own first."""
        ...


@runtime_checkable
class Target(Protocol):
    """The model whose output is to stay unchanged.

    Attributes:
        vocab_size: Width V of the logits.
        reach: What one forward scores exactly.
        max_length: Context limit in tokens, or None.
        max_batch: Rows one session can hold, or None.
        max_nodes: Draft nodes that one forward may hold.
    """

    vocab_size: int
    reach: Reach
    max_length: int | None
    max_batch: int | None
    max_nodes: int

    def session(self, batch: int, **inputs: Any) -> Session:
        """Open a session; ``inputs`` are encoder inputs where the target has an encoder."""
        ...


@runtime_checkable
class Law(Protocol):
    """From raw logits to the distribution that a token is drawn from.

    Attributes:
        taps: Inner states of the target that its reshapes read.
        drafting: The law for a drafter's own logits: this one without the reshapes that combine
            models, read the target's inner states or keep what the target has said.
    """

    taps: Taps

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        ...

    @property
    def drafting(self) -> Law:
        """See above."""
        ...

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start on new rows."""
        ...

    def forget(self, requests: Sequence[int]) -> None:
        """Let go of requests that have left."""
        ...

    def logits(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """Processed logits [B, N, V]; each node sees its own path."""
        ...

    def probs(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """Probabilities [B, N, V], float32 or wider, exact zeros for banned tokens."""
        ...


@runtime_checkable
class Reshape(Protocol):
    """Changes the law of the next token before anything is picked: the first part of a strategy.

    It sees all nodes of a draft in one call and gives each node the law of its own path, so that
    every lossless acceptance rule stays lossless, for the reshaped law.
    :class:`isthmus.decoding.reshape.Walk` is the base of those that keep a state along the path.

    Attributes:
        stage: When it has its turn.
        taps: Inner states of the target that it reads, in ``context.features``.

    One that keeps what the target has said, and so must not hear a drafter's logits, says so by
    ``hears = True``.
    """

    stage: Stage
    taps: Taps

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start on new rows, which ``context.requests`` names; others may be at work."""
        ...

    def forget(self, requests: Sequence[int]) -> None:
        """Let go of requests that have left."""
        ...

    def __call__(self, logits: torch.Tensor, tree: TokenTree, context: Context) -> torch.Tensor:
        """New logits [B, N, V], float32 or wider; -inf bans a token."""
        ...


@runtime_checkable
class Constraint(Protocol):
    """What a text may be, compiled for one vocabulary.

    States are values: moving on makes a new one, so that the branches of a tree and the beams of a
    search need no copies. Masks are int32 [R, W], a bit for each token, the lowest bit first.
    :class:`isthmus.decoding.constrained.Constrained` makes a reshape of it.

    Attributes:
        exact: Whether everything that was asked for is held; False only where the caller has
            agreed to less.
    """

    exact: bool

    def start(self) -> Any:
        """The state before the first token."""
        ...

    def advance(self, state: Any, token: int) -> Any:
        """The state after one more token; after a forbidden one it is dead."""
        ...

    def rollback(self, state: Any, count: int) -> Any:
        """The state ``count`` tokens ago."""
        ...

    def mask(self, states: Sequence[Any]) -> torch.Tensor:
        """Tokens that may follow each state, int32 [R, W]; end tokens where the text may end."""
        ...

    def mask_tree(self, state: Any, tokens: Sequence[int], parents: Sequence[int]) -> torch.Tensor:
        """Masks of all nodes of a tree whose root has the given state, int32 [N, W]."""
        ...

    def accepting(self, state: Any) -> bool:
        """Whether the text may end here."""
        ...

    def forced(self, state: Any) -> tuple[int, ...]:
        """Tokens of the text that follows whatever the model says: drafts that always stand."""
        ...


@runtime_checkable
class Forkable(Protocol):
    """A reshape, or the side state of a search, that follows hypotheses as they are copied."""

    def fork(self, parents: Sequence[int], requests: Sequence[int]) -> None:
        """Go on as ``requests``, each from a copy of the state of its parent request.

        A request may be the parent of several or of none; others than those named are let go.
        """
        ...


@dataclass(frozen=True)
class Hypothesis:
    """One complete answer of a search.

    Attributes:
        tokens: New tokens.
        logprob: Sum of their log-probabilities under the law that was searched.
        score: What hypotheses are ranked by: the log-probability after length normalisation, say.
        trace: Whatever the search or a reranker wants to keep beside it.
    """

    tokens: tuple[int, ...]
    logprob: float
    score: float
    trace: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What a search takes on after one step, for W hypotheses of each of B rows.

    Attributes:
        parent: Hypothesis that each new one continues, int64 [B, W].
        token: The token it adds, int64 [B, W].
        logprob: Log-probability of that token, float [B, W].
    """

    parent: torch.Tensor
    token: torch.Tensor
    logprob: torch.Tensor


@runtime_checkable
class Search(Protocol):
    """Owns W hypotheses of each row and decides which live on; greedy and sampling are W = 1.

    Attributes:
        width: Hypotheses W of each row.
    """

    width: int

    def start(
        self,
        rows: int,
        generator: torch.Generator,
        *,
        end_tokens: Sequence[int],
        max_new_tokens: int,
    ) -> None:
        """Begin on B rows, one empty hypothesis each, that end at these tokens or this length."""
        ...

    def step(self, logprobs: torch.Tensor) -> Choice | None:
        """Choose among the continuations, log-probabilities [B, W, V]; None when all is done.

        W is 1 in the first step. :func:`isthmus.decoding.search.search` reorders and forks caches
        and the states of reshapes after ``Choice.parent``.
        """
        ...

    def finish(self) -> list[list[Hypothesis]]:
        """Finished hypotheses of each row, best first."""
        ...


@runtime_checkable
class Rerank(Protocol):
    """Chooses among complete answers: minimum Bayes risk, consensus, best of n."""

    def choose(self, hypotheses: Sequence[Hypothesis], source: Any = None) -> int:
        """Index of the answer to give; ties go to the first."""
        ...


@runtime_checkable
class Drafter(Protocol):
    """Proposes a token tree before the target is asked.

    ``begin`` starts a batch of requests, ``propose`` drafts below the root, ``observe`` sees every
    finished round (whoever drafted it), ``select`` follows when finished rows leave the batch.
    """

    name: str

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start on new rows; prompts are in ``context``, encoder inputs in ``inputs``."""
        ...

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """Draft at most ``shape`` below each root; a bare root is a valid answer."""
        ...

    def observe(self, step: Step) -> None:
        """Learn from a finished round."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the given rows of the batch."""
        ...


@runtime_checkable
class Extendable(Protocol):
    """A drafter or a policy that takes in new requests while others are at work.

    Without it, new requests wait until the batch is empty and ``begin`` is called again.
    """

    def extend(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start on more rows, which follow those at work; ``context`` holds the new ones alone."""
        ...


@runtime_checkable
class Acceptance(Protocol):
    """Decides which draft tokens stand.

    Attributes:
        lossless: True when the output keeps the law of plain decoding exactly.
    """

    lossless: bool

    def accept(self, tree: TokenTree, logits: torch.Tensor, context: Context) -> Verdict:
        """Walk the tree with raw target logits [B, N, V] and return the verdict."""
        ...


@runtime_checkable
class Policy(Protocol):
    """Decides, before anything is drawn, who drafts and how much; owns the drafters."""

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Start on new rows."""
        ...

    def decide(self, context: Context, limit: Shape) -> tuple[Drafter | None, Shape]:
        """Choose a drafter (None for plain decoding) and a shape within ``limit``."""
        ...

    def observe(self, step: Step, drafter: Drafter | None) -> None:
        """Learn from a finished round and let the drafters learn."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the given rows of the batch."""
        ...


@dataclass(frozen=True)
class RoundTrace:
    """One round of one row, for reports and pictures.

    Attributes:
        drafter: Name of the drafter, or ``"none"``.
        nodes: Draft nodes scored, the root not counted.
        accepted: Draft tokens accepted and kept.
        emitted: Tokens emitted, the final one included.
        drafted: Tokens of the tree in node order, the root not counted.
        parents: Parent node of each drafted token.
    """

    drafter: str
    nodes: int
    accepted: int
    emitted: int
    drafted: tuple[int, ...] = field(default=(), repr=False)
    parents: tuple[int, ...] = field(default=(), repr=False)


@runtime_checkable
class Index(Protocol):
    """Documents under ids, searched by representations: vectors, several vectors, or words.

    Attributes:
        exact: Whether a search finds the best documents for certain.
        ids: Ids in the order they were added.
    """

    exact: bool
    ids: list[str]

    def add(self, ids: Sequence[str], reps: Any) -> None:
        """Add documents, each under an id that is new to the index."""
        ...

    def search(self, reps: Any, k: int = 10) -> tuple[list[list[str]], Any]:
        """Ids [Q][k] and falling scores [Q, k]; equal scores come in the order of ids."""
        ...


@runtime_checkable
class TermWeigher(Protocol):
    """Says which terms a text stands for, and how much: what a sparse index takes besides counts.

    Attributes:
        searched: ``dense``, ``sparse`` or both: what of it is fit to be searched with. The dense
            half is that of an embedding model; the scores of both are added up.
    """

    searched: tuple[str, ...]

    def weigh(self, texts: Sequence[str], side: str = "document") -> list[dict[str, float]]:
        """Weights by term of every text, none negative; the side is ``query`` or ``document``."""
        ...


@dataclass
class Loss:
    """What one batch taught.

    Attributes:
        total: Sum of the loss over all that counts, a scalar with a gradient.
        weight: How much counts: tokens, frames, pixels, pairs.
        sums: Further sums to report, divided by the same weight.
    """

    total: torch.Tensor
    weight: torch.Tensor | float
    sums: dict[str, torch.Tensor | float] = field(default_factory=dict)


@runtime_checkable
class Learner(Protocol):
    """What is trained: a module, its data, its loss and its ruler.

    Attributes:
        module: What learns. While it is trained this is a wrapper, so a loss calls it as
            ``learner.module(...)``.
        lower_is_better: Whether the first metric of :meth:`validate` should fall.
        identity: Plain data that decides what is learnt, besides the plan and the shapes: the
            system, its settings, a fingerprint of the data.
    """

    module: Any
    lower_is_better: bool
    identity: dict[str, Any]

    def batch(self, part: int) -> Any:
        """The micro-batch of that number, counted over all steps and processes; from it alone."""
        ...

    def loss(self, batch: Any) -> Loss:
        """Loss of one micro-batch; draws from torch's generator, which the loop has seeded."""
        ...

    def validate(self) -> dict[str, float]:
        """Metrics on held-out data; the first one decides which weights are kept."""
        ...


@runtime_checkable
class Streaming(Protocol):
    """Works on sound as it arrives, in packets of any size.

    All packets and the flush together give what one packet of the whole gives.
    ``isthmus.testing.check_streaming`` holds a part to it.

    Attributes:
        lookahead: Samples that have to be heard after a sample before its answer is complete.
    """

    lookahead: int

    def init_state(self, batch: int) -> Any:
        """The state before the first packet."""
        ...

    def step(self, chunk: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        """Take in a packet [B, N], N may be 0; what is complete comes out, and the new state."""
        ...

    def flush(self, state: Any) -> torch.Tensor:
        """The rest, once no more sound will come."""
        ...


@runtime_checkable
class FrameScorer(Protocol):
    """Says what may be written at a frame of a sound after a text; token 0, the blank, reads on.

    Transducers play it. A state is a value that holds one row for each row of the batch. A scorer
    that does not look at the sound while it reads a text returns the state of ``hear`` unchanged.
    """

    def start(self, batch: int) -> Any:
        """The state before the first token and the first frame."""
        ...

    def hear(self, frames: torch.Tensor, lengths: torch.Tensor, state: Any) -> Any:
        """The state once frames [B, N, D] have come in, ``lengths`` [B] of them valid."""
        ...

    def score(self, frames: torch.Tensor, state: Any) -> torch.Tensor:
        """Log-probabilities [B, N, V] at each of these frames [B, N, D] after the text so far."""
        ...

    def advance(self, tokens: torch.Tensor, where: torch.Tensor, state: Any) -> Any:
        """The state after one token more, int64 [B], in the rows ``where`` is True, bool [B]."""
        ...


@runtime_checkable
class Lens(Protocol):
    """Looks into something and explains what it does on an input.

    An explanation carries the identities that the lens must satisfy, and counts only where they
    hold. ``isthmus.testing.check_lens`` holds a lens to it.
    """

    def open(self, source: str) -> Any:
        """What is looked into, by the name or folder that a user gives."""
        ...

    def explain(self, subject: Any, given: str) -> Any:
        """An :class:`~isthmus.lenses.explanation.Explanation` of what it does with an input."""
        ...


@runtime_checkable
class Surgery(Protocol):
    """Makes a trained model smaller, sparser or cheaper: first a plan, then the cut.

    A budget is the share of something that is kept, above 0 and at most 1; at 1 the model computes
    what it computed before. ``isthmus.testing.check_surgery`` holds an operation to it, and
    ``isthmus shrink`` finds every system of this role by its name.

    Attributes:
        keeps: What the budget is a share of, for messages: "weights of the linear layers".
    """

    @property
    def keeps(self) -> str:
        """See above."""
        ...

    def plan(
        self, model: Any, data: Calibration, budget: float, steps: base.Steps | None = None
    ) -> base.Plan:
        """Decide what is done to a model of transformers; only reads it.

        Args:
            model: In eval mode.
            data: Samples to run it on.
            budget: Share that is kept.
            steps: Keeps finished pieces of the work; its ``key`` is set by the caller.

        Raises:
            InvalidInputError: A budget that cannot be met.
            UnsupportedModelError: A model without the sites that it works on.
        """
        ...

    def apply(self, model: Any, plan: base.Plan) -> base.Report:
        """Change the model in place, as planned.

        Raises:
            MismatchError: The plan was made for another model, or by another method.
        """
        ...


Medium = Literal["audio", "image", "video", "tensor", "bytes"]
"""What a codec makes small."""


@dataclass
class Signal:
    """A signal on its way into a codec or out of it: what it is, and its pieces in order.

    ======  ======================================  ============================================
    medium  ``info``                                a chunk
    ======  ======================================  ============================================
    audio   dtype, shape [C, N or None], rate_hz    int32 or float32 [C, n]
    image   dtype, shape [C, H, W]                  uint8, or int32 for 16 bits, [C, rows, W]
    video   dtype, shape [T or None, C, H, W],      uint8, or int32 for more bits,
            rate (a fraction, ``"25/1"``)           [frames, C, H, W]
    tensor  dtype, shape                            the tensor
    bytes   dtype, shape [N]                        uint8 [n]
    ======  ======================================  ============================================

    Sound of whole numbers says so by its dtype (``int8``, ``int16``, ``int24``, ``int32``) and has
    them in int32; sound as ``float32`` lies nominally within [-1, 1]. A length that nobody knows
    yet is None.

    Attributes:
        info: ``medium`` and what the table names: integers, strings, lists of integers and None.
        chunks: The pieces; gone once they have been walked over.
    """

    info: Mapping[str, Any]
    chunks: Iterable[torch.Tensor]

    @property
    def medium(self) -> Medium:
        """What it is."""
        medium: Medium = self.info["medium"]
        return medium


@runtime_checkable
class Codec(Protocol):
    """A signal becomes frames of bytes, and becomes a signal again.

    ``isthmus.testing.check_codec`` holds a codec to it; :mod:`isthmus.codecs.base` has bases, the
    look-up by id, and the way into files and back.

    Attributes:
        id: ``family/slug``.
        medium: What it codes.
        lossless: Whether every bit comes back.
        numerics: ``static``, ``int`` or ``pinned``: what a decoder has to compute alike
            (:mod:`isthmus.codecs.rangecoder`).
        fingerprint: 32 bytes that name the model a decoder needs; zeros where it needs none.
        fields: Names of the parameters, which short headers leave out.
    """

    @property
    def id(self) -> str:
        """See above, as for the next five."""
        ...

    @property
    def medium(self) -> Medium: ...  # noqa: D102

    @property
    def lossless(self) -> bool: ...  # noqa: D102

    @property
    def numerics(self) -> str: ...  # noqa: D102

    @property
    def fields(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def fingerprint(self) -> bytes: ...  # noqa: D102

    def parameters(self, info: Mapping[str, Any], rate: float | None = None) -> dict[str, Any]:
        """What the header has to say besides the signal's own ``info``.

        Args:
            info: Of the signal.
            rate: Wanted rate, bits per pixel or kbit/s, of a codec that has a choice.

        Raises:
            InvalidInputError: A signal that it does not code, or a rate that it does not have.
        """
        ...

    def encode(self, signal: Signal, header: Header) -> Iterator[Frame]:
        """Frames of a signal, each as soon as it is complete."""
        ...

    def decode(self, header: Header, frames: Iterable[Frame]) -> Iterator[torch.Tensor]:
        """Chunks of the signal that the header describes.

        Every frame's symbols are shown to :meth:`~isthmus.codecs.container.Frame.verify`.

        Raises:
            BrokenFileError: Parameters or frames that the codec never writes.
            DesyncError: Other symbols than were coded.
        """
        ...
