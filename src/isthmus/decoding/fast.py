"""The fast target: a supported model run by one compiled kernel instead of module by module.

It is a :class:`~isthmus.decoding.target.HubTarget` with the same sessions and the same cache; only
the forward of a session is another one. Weights have the dtype that they have in transformers;
arithmetic is float32 throughout, which in bfloat16 rounds less than the model itself. That both
agree is checked when the target is made.

Weights of more than :data:`TWICE` bytes are read where transformers has them. Those of smaller
models are copied into the order in which a product of many nodes costs least. Weights may change in
place or be moved: the next session lays them out again. What no version of a parameter counts, such
as writing to ``parameter.data``, needs a new target. Hooks put on modules later are not run.

An encoder-decoder model is three programs: its encoder, the keys and values that its decoder reads
of the encoder's output (both once for each source), and its decoder.

Sums are taken in an order that depends neither on the number of nodes nor on the slot of a key, so
plain and speculative decoding compute the same numbers bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutput

from isthmus.decoding.lower import Lowered, lower
from isthmus.decoding.native import Kernel, Stored
from isthmus.decoding.target import HubTarget, SlotSession, tolerance
from isthmus.decoding.tree import TokenTree, Topology
from isthmus.errors import UnsupportedModelError
from isthmus.roles import Features, Scores, Session, Taps

TWICE = 256 * 2**20
"""Bytes of weights up to which they are held a second time, in the kernel's own order."""


class FastTarget(HubTarget):
    """A decoder-only or encoder-decoder model of transformers, run by the compiled kernel.

    Args:
        model: The model, in eval mode, on the CPU, in float32 or bfloat16.

    Attributes:
        kernel: Runs the decoder.
        encoder: Runs the encoder; None where there is none, or where it stays the model's own.
        bridge: Makes keys and values of the encoder's output, where there is an encoder.
        weights: ``"int8"`` once they are rounded.

    Raises:
        UnsupportedModelError: The model is built in another way than the kernel knows, the kernel
            cannot be compiled here, or the two do not agree.
    """

    lowered: Lowered
    kernel: Kernel
    encoder: Kernel | None = None
    bridge: Kernel | None = None
    weights = ""

    def __init__(self, model: Any) -> None:
        super().__init__(model, reach="tree")
        worst = self._disagreement()
        if not worst <= tolerance(self.dtype):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no fast forward: it differs from the model's own by "
                f"{worst:.1e} of the logit spread"
            )

    @torch.no_grad()
    def _disagreement(self) -> float:
        """Largest difference to the model's own logits on one path of a tree, over their spread.

        One short forward of the model, which may be slow in this dtype on this processor.
        """
        window = self.window or 0
        prefix = 2 + (window if window < 64 else 0)  # a small window is worth filling
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, self.vocab_size, (prefix + 4,), generator=generator)
        path = [0, 1, 3]
        inputs = self.probe_inputs()
        encoded = super().encode(**inputs) if inputs else None
        session = self.session(1, **inputs)
        session.prefill([tokens[:prefix]])
        tree = TokenTree(tokens[None, prefix:], Topology.of([-1, 0, 0, 1]))
        got = session.score(tree).logits[0, path]
        whole = torch.cat([tokens[:prefix], tokens[prefix:][path]])
        want = super().forward(whole[None], encoded=encoded).logits[0, prefix:].float()
        return float((got - want).abs().max() / (want.max() - want.min()).clamp(min=1e-9))

    def _prepare(self) -> None:
        name = type(self.model).__name__
        if self.recurrent or self.takes_images:
            raise UnsupportedModelError(f"{name} is not a plain decoder with a key/value cache")
        if len(set(self.layout)) > 1:
            raise UnsupportedModelError(f"the layers of {name} cache keys of different shapes")
        windows = [(self.window or 0) if kind == "sliding" else 0 for kind in self.kinds]
        try:
            self.lowered = lower(self.model, windows)
            if sum(p.nbytes for p in self.model.parameters()) <= TWICE:
                for program in self.lowered.programs:
                    program.lay_out()
            self._start()
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{name} has no fast forward: {error}") from error
        self.state_dtype = torch.float32

    def _start(self) -> None:
        parts = self.lowered.decoder, self.lowered.encoder, self.lowered.bridge
        made = [None if program is None else Kernel(program) for program in parts]
        assert made[0] is not None
        self.kernel, self.encoder, self.bridge = made[0], *made[1:]

    def to_int8(self) -> None:
        """Round the weights to int8, which makes another model of it, though a close one.

        The modules of transformers keep theirs.

        Raises:
            UnsupportedModelError: A width that the kernel cannot take in int8.
        """
        for program in self.lowered.programs:
            program.to_int8()
        self._start()
        self.weights = "int8"

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Input embeddings float32 [..., D] of tokens [...], without positions."""
        return super().embed(tokens).float()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 [..., V] of last hidden states [..., D]."""
        return super().head(hidden) if hidden.requires_grad else self.kernel.head(hidden)

    def session(self, batch: int, **inputs: Any) -> Session:
        """Open a session; see :meth:`HubTarget.session`."""
        if self.lowered.stale:
            self._prepare()
            if self.weights:
                self.to_int8()
        self.check_inputs(inputs)
        return self.opened(batch, self.encode(**inputs) if inputs else {})

    def opened(self, batch: int, encoded: dict[str, Any]) -> FastSession:
        """A session of this target's kind."""
        return FastSession(self, batch, encoded)

    @torch.no_grad()
    def encode(self, **inputs: Any) -> dict[str, Any]:
        """Run the encoder once; see :meth:`HubTarget.encode`. Its output is float32.

        What a row becomes does not depend on the others.
        """
        mask = inputs.get("attention_mask")
        encoded: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
        if "encoder_outputs" in inputs:
            states = inputs["encoder_outputs"][0].float()
        elif self.encoder is None or "input_ids" not in inputs:
            first = next((x for x in inputs.values() if torch.is_tensor(x)), torch.empty(1))
            alone = [{name: x[i : i + 1] for name, x in inputs.items()} for i in range(len(first))]
            parts = [super(FastTarget, self).encode(**row)["encoder_outputs"][0] for row in alone]
            states = torch.cat(parts).float()
        else:
            tokens = inputs["input_ids"]
            last = self.encoder.program.layers + 1
            shape = *tokens.shape, self.encoder.program.hidden_size
            states = torch.zeros(shape, dtype=torch.float32)
            for rows, width in alike(tokens, mask, CLOSE):
                part = tokens[rows, :width]
                seen = None if mask is None else mask[rows, :width]
                store = self._store(self.encoder, 1, len(rows), width, seen)
                places = torch.arange(width).expand(len(rows), -1)
                _, taken = self.encoder.forward(part, places, store, tapped=(last,), logits=False)
                assert taken is not None
                states[rows, :width] = taken[0]
        return encoded | {"encoder_outputs": BaseModelOutput(last_hidden_state=states)}

    def source(self, encoded: dict[str, Any]) -> Stored:
        """Keys and values of the encoder's output for every decoder layer."""
        assert self.bridge is not None
        states, mask = encoded["encoder_outputs"][0], encoded.get("attention_mask")
        layers = self.bridge.program.layers
        batch, count = states.shape[:2]
        stored = self._store(self.bridge, layers, batch, count, mask)
        for rows, width in alike(states, mask):
            if len(rows) == batch:
                self.bridge.store(states, stored)  # all at once need no copy
                break
            part = self._store(self.bridge, layers, len(rows), width, None)
            self.bridge.store(states[rows, :width], part)
            stored.keys[:, rows, :, :width] = part.keys
            stored.values[:, rows, :, :width] = part.values
        return stored

    def _store(
        self, kernel: Kernel, layers: int, batch: int, count: int, mask: torch.Tensor | None
    ) -> Stored:
        """Room for ``count`` source tokens a row, of which a mask [B, T] says which are seen."""
        shape = layers, batch, kernel.program.kv_heads, count, kernel.program.head_dim
        lengths, live = torch.full((batch,), count), None
        if mask is not None and not bool(mask.all()):
            lengths, live = mask.sum(1).long(), in_order(mask > 0)
        return Stored(
            torch.empty(shape, dtype=torch.float32),
            torch.empty(shape, dtype=torch.float32),
            count,
            lengths,
            live,
        )

    def forward(
        self, tokens: torch.Tensor, *, encoded: dict[str, Any] | None = None, **options: Any
    ) -> Scores:
        """One call of the model itself; see :meth:`HubTarget.forward`."""
        if encoded:
            states = encoded["encoder_outputs"][0].to(self.dtype)
            encoded = encoded | {"encoder_outputs": BaseModelOutput(last_hidden_state=states)}
        return super().forward(tokens, encoded=encoded, **options)


ENOUGH = 128
"""Source tokens that are worth a forward of their own: two tiles of the kernel's."""

CLOSE = 256
"""Source tokens whose states, up to the widest ones, stay in a second-level cache."""


def alike(
    source: torch.Tensor, mask: torch.Tensor | None, most: int | None = None
) -> list[tuple[torch.Tensor, int]]:
    """Rows of a source [B, T, ...] in groups of like length, so that little padding is computed.

    Args:
        source: What has rows and tokens.
        mask: Tokens that are seen [B, T]; None is all.
        most: Tokens of a group, where it has more than one row; None is any number.

    Returns:
        For each group its rows, int64, and the width that holds their tokens.

    Example:
        >>> mask = torch.arange(200) < torch.tensor([[9], [200], [9]])
        >>> [(rows.tolist(), width) for rows, width in alike(mask, mask)]
        [([1], 200), ([0, 2], 9)]
    """
    batch, count = source.shape[:2]
    if mask is None or batch == 1:
        return [(rows, count) for rows in _shared(torch.arange(batch), count, most)]
    ends = ((mask > 0) * torch.arange(1, count + 1)).amax(1).clamp(min=1)
    width, rows = ends.sort(descending=True, stable=True)
    widths, cuts = width.tolist(), [0]
    for row in range(1, batch):
        first = widths[cuts[-1]]
        if widths[row] < first and (row - cuts[-1]) * first >= ENOUGH:
            cuts.append(row)
    parts = rows.tensor_split(cuts[1:])
    return [
        (some.sort().values, widths[cut])
        for part, cut in zip(parts, cuts, strict=True)
        for some in _shared(part, widths[cut], most)
    ]


def _shared(rows: torch.Tensor, width: int, most: int | None) -> list[torch.Tensor]:
    """Rows of one width in as few equal groups as hold up to ``most`` tokens each."""
    each = len(rows) if most is None else max(1, most // max(1, width))
    return list(rows.tensor_split(max(1, -(-len(rows) // max(1, each)))))


def in_order(seen: torch.Tensor) -> torch.Tensor:
    """Slots bool [B, S] that are seen, in order, int32 [B, S]; the rest follows.

    Example:
        >>> in_order(torch.tensor([[False, True, True]])).tolist()
        [[1, 2, 0]]
    """
    order = torch.sort((~seen).to(torch.uint8), dim=1, stable=True).indices
    return order.to(torch.int32).contiguous()  # a mask may lie column by column


class FastSession(SlotSession):
    """A session whose forwards are run by the kernel."""

    target: FastTarget
    source: Stored | None = None
    origins: Sequence[int] = ()
    """Which source each row reads: rows of one number have the same."""

    def __init__(self, target: FastTarget, batch: int, encoded: dict[str, Any]) -> None:
        super().__init__(target, batch, encoded)
        self.origins = range(batch)
        if encoded:
            self.source = target.source(encoded)

    def choose(self, tree: TokenTree, *, taps: Taps | None = None) -> Scores:
        """Run the model on a tree of which nothing but the likeliest tokens is read."""
        return self._forward(tree, taps=taps, choice=True)

    def _run(self, tree: TokenTree, *, taps: Taps | None = None, last_only: bool = False) -> Scores:
        return self._forward(tree, taps=taps, logits=not last_only)

    def _forward(
        self,
        tree: TokenTree,
        *,
        taps: Taps | None = None,
        logits: bool = True,
        choice: bool = False,
    ) -> Scores:
        cache, kernel = self.cache, self.target.kernel
        if taps is not None and taps.cross_attention:
            raise UnsupportedModelError(
                "the compiled forward keeps no attention weights; make the model with fast=False"
            )
        cache.reserve(tree.nodes)
        layers = () if taps is None else (*taps.layers, *([kernel.program.layers + 1] * taps.final))
        found, states = kernel.forward(
            tree.tokens,
            self._positions(tree),
            Stored(
                cache.arenas[0].keys,
                cache.arenas[0].values,
                cache.used,
                torch.tensor(cache.lengths),
                self._live(),
            ),
            source=self.source,
            ancestors=None if tree.is_chain else tree.topology.ancestors,
            tapped=layers,
            logits=logits,
            choice=choice,
        )
        features = None
        if states is not None and taps is not None:
            by_layer = dict(zip(taps.layers, states, strict=False))
            features = Features(states[-1] if taps.final else None, by_layer)
        if found is None:  # a prompt's logits are never read
            return Scores(torch.empty(0), features)
        if found.ndim == 2:
            return Scores(torch.empty(0), features, found)
        return Scores(found, features)

    def _live(self) -> torch.Tensor | None:
        """Slots of the committed tokens of each row, in order; None when they are 0, 1, 2 ..."""
        _, live = self.cache.slots()
        if live is None:
            return None
        return in_order(live)  # committed tokens are appended in the order of their positions

    def fork(self, rows: Sequence[int]) -> SlotSession:
        """Copies of the given rows."""
        twin = super().fork(rows)
        assert isinstance(twin, FastSession)
        twin.origins = [self.origins[row] for row in rows]
        if self.source is not None:
            twin.source = chosen_sources(self.source, rows)
        return twin

    def reorder(self, rows: Sequence[int]) -> None:
        """Put the rows into another order; see :meth:`SlotSession.reorder`."""
        super().reorder(rows)
        origins = [self.origins[row] for row in rows]
        if self.source is not None and origins != list(self.origins):  # in a search, they are alike
            self.source = chosen_sources(self.source, rows)
        self.origins = origins

    def join(self, other: Session) -> SlotSession:
        """Copies of the rows of both sessions, this one's first.

        Raises:
            MismatchError: The other session is that of another target.
        """
        twin = super().join(other)
        assert isinstance(twin, FastSession) and isinstance(other, FastSession)
        above = max(self.origins, default=-1) + 1
        twin.origins = [*self.origins, *(above + origin for origin in other.origins)]
        if self.source is not None:
            assert other.source is not None
            twin.source = join_sources(self.source, other.source)
        return twin


def chosen_sources(stored: Stored, rows: Sequence[int]) -> Stored:
    """Copies of the given rows."""
    index = torch.tensor(list(rows))
    return Stored(
        stored.keys.index_select(1, index),
        stored.values.index_select(1, index),
        stored.used,
        stored.lengths[index],
        None if stored.live is None else stored.live[index],
    )


def join_sources(first: Stored, second: Stored) -> Stored:
    """The rows of both, with room for the longer ones."""
    pair, width = (first, second), max(first.used, second.used)

    def longer(x: torch.Tensor, slots: int) -> torch.Tensor:
        return F.pad(x, (*(0, 0) * (x.ndim == 5), 0, width - slots))

    lives = [
        torch.arange(s.used, dtype=torch.int32).expand(len(s.lengths), -1)
        if s.live is None
        else s.live
        for s in pair
    ]
    whole = first.live is None and second.live is None
    return Stored(
        torch.cat([longer(s.keys, s.used) for s in pair], 1),
        torch.cat([longer(s.values, s.used) for s in pair], 1),
        width,
        torch.cat([s.lengths for s in pair]),
        None if whole else torch.cat([longer(x, s.used) for x, s in zip(lives, pair, strict=True)]),
    )


def best_target(model: Any) -> HubTarget:
    """The fast target of a model where there is one, else the general one.

    ``why_general`` of a general target says what stood in the way.

    Raises:
        UnsupportedModelError: The model cannot be decoded with an unchanged output.
    """
    try:
        return FastTarget(model)
    except UnsupportedModelError as error:
        target = HubTarget(model)
        target.why_general = str(error)
        return target
