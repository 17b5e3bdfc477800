"""The fast target: a supported decoder run by one compiled kernel instead of module by module.

It is a :class:`~isthmus.decoding.target.HubTarget` with the same sessions and the same cache; only
the forward of a session is another one. Weights are read where transformers has them, so nothing is
held twice, and in the dtype they have; arithmetic is float32 throughout, which in bfloat16 rounds
less than the model itself. That both agree is checked when the target is made.

Weights may change in place or be moved; hooks that are put on modules later are not run.

Sums are taken in an order that depends neither on the number of nodes nor on the slot of a key, so
plain and speculative decoding compute the same numbers bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch

from isthmus.decoding.native import Kernel
from isthmus.decoding.program import lower
from isthmus.decoding.target import HubTarget, SlotSession, tolerance
from isthmus.decoding.tree import TokenTree, Topology
from isthmus.errors import UnsupportedModelError
from isthmus.roles import Features, Scores, Session, Taps


class FastTarget(HubTarget):
    """A decoder-only model of transformers, run by the compiled kernel.

    Args:
        model: The model, in eval mode, on the CPU, in float32 or bfloat16.

    Attributes:
        weights: ``"int8"`` once they are rounded.

    Raises:
        UnsupportedModelError: The model is built in another way than the kernel knows, the kernel
            cannot be compiled here, or the two do not agree.
    """

    kernel: Kernel
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
        session = self.session(1)
        session.prefill([tokens[:prefix]])
        tree = TokenTree(tokens[None, prefix:], Topology.of([-1, 0, 0, 1]))
        got = session.score(tree).logits[0, path]
        whole = torch.cat([tokens[:prefix], tokens[prefix:][path]])
        want = self.forward(whole[None]).logits[0, prefix:].float()
        return float((got - want).abs().max() / (want.max() - want.min()).clamp(min=1e-9))

    def _prepare(self) -> None:
        name = type(self.model).__name__
        if self.encoder_decoder or self.recurrent or self.takes_images:
            raise UnsupportedModelError(f"{name} is not a plain decoder with a key/value cache")
        if len(set(self.layout)) > 1:
            raise UnsupportedModelError(f"the layers of {name} cache keys of different shapes")
        windows = [(self.window or 0) if kind == "sliding" else 0 for kind in self.kinds]
        try:
            self.kernel = Kernel(lower(self.model, windows))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{name} has no fast forward: {error}") from error
        self.state_dtype = torch.float32

    def to_int8(self) -> None:
        """Round the weights to int8, which makes another model of it, though a close one.

        The modules of transformers keep theirs.

        Raises:
            UnsupportedModelError: A width that the kernel cannot take in int8.
        """
        self.kernel.program.to_int8()
        self.kernel = Kernel(self.kernel.program)
        self.weights = "int8"

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Input embeddings float32 [..., D] of tokens [...], without positions."""
        return super().embed(tokens).float()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 [..., V] of last hidden states [..., D]."""
        return super().head(hidden) if hidden.requires_grad else self.kernel.head(hidden)

    def session(self, batch: int, **inputs: Any) -> Session:
        """Open a session; see :meth:`HubTarget.session`."""
        if self.kernel.program.stale:
            self._prepare()
            if self.weights:
                self.to_int8()
        if inputs:
            return super().session(batch, **inputs)  # which says that there is no encoder
        return FastSession(self, batch, {})


class FastSession(SlotSession):
    """A session whose forwards are run by the kernel."""

    target: FastTarget

    def _run(self, tree: TokenTree, *, taps: Taps | None = None, last_only: bool = False) -> Scores:
        cache, kernel = self.cache, self.target.kernel
        cache.reserve(tree.nodes)
        layers = () if taps is None else (*taps.layers, *([kernel.program.layers + 1] * taps.final))
        logits, states = kernel.forward(
            tree.tokens,
            self._positions(tree),
            keys=cache.arenas[0].keys,
            values=cache.arenas[0].values,
            used=cache.used,
            lengths=torch.tensor(cache.lengths),
            live=self._live(),
            ancestors=None if tree.is_chain else tree.topology.ancestors,
            tapped=layers,
            logits=not last_only,
        )
        features = None
        if states is not None and taps is not None:
            by_layer = dict(zip(taps.layers, states, strict=False))
            features = Features(states[-1] if taps.final else None, by_layer)
        # a prompt's logits are never read
        return Scores(torch.empty(0) if logits is None else logits, features)

    def _live(self) -> torch.Tensor | None:
        """Slots of the committed tokens of each row, in order; None when they are 0, 1, 2 ..."""
        _, live = self.cache.slots()
        if live is None:
            return None
        # committed tokens are appended in the order of their positions
        return torch.sort((~live).to(torch.uint8), dim=1, stable=True).indices.to(torch.int32)


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
