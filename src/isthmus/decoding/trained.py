"""What trained drafters share: their place in the loop, their trees, their files.

A trained drafter reads inner states of the target (:class:`~isthmus.roles.Taps`). The loop here is
the same for all of them::

    begin / observe ──> Fresh: newly verified tokens with the target's features
                          │
                        absorb()           catch up: state and cache hold true features only
                          │
    propose ──────────> expand(level)      logits of the children of a frontier, level by level
                          │
                        a chain (drawn, with q) or a best-first tree (chosen)

A system fills in ``reset``, ``absorb``, ``expand`` and ``select_state`` for decoding and ``loss``
for training. Words: after a round the tokens ``x_1 .. x_t`` have features, the root ``x_{t+1}`` was
chosen by the target and has none yet; level k proposes ``x_{t+1+k}``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from isthmus import folders
from isthmus.decoding.builders import Growth, Level
from isthmus.decoding.law import chain_logits, draw_next
from isthmus.decoding.target import HubTarget
from isthmus.decoding.tree import TokenTree
from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError, UnsupportedModelError
from isthmus.folders import digest, published
from isthmus.nn.decoder import LayerSizes
from isthmus.roles import Context, Features, Shape, Step, Taps, Target
from isthmus.settings import tuples

CONFIG, WEIGHTS = "isthmus.json", "model.safetensors"


@dataclass(frozen=True)
class Fresh:
    """Tokens that were verified since the last call, real ones first.

    Attributes:
        tokens: ``x_i``, int64 [B, M].
        following: ``x_{i+1}``, the token after each, int64 [B, M]; the last one is the new root.
        features: The target's inner states at ``x_i``.
        valid: Which of them are real, bool [B, M].
    """

    tokens: torch.Tensor
    following: torch.Tensor
    features: Features
    valid: torch.Tensor

    @property
    def final(self) -> torch.Tensor:
        """``f_i``, the target's last hidden states [B, M, D]."""
        assert self.features.final is not None
        return self.features.final

    @property
    def last(self) -> torch.Tensor:
        """Place of the last real token of each row, int64 [B]; 0 where there is none."""
        return self.valid.sum(1).clamp(min=1) - 1

    def at_last(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of x [B, M, ...] at the last real token, [B, ...]."""
        return x[torch.arange(len(x), device=x.device), self.last]


@dataclass(frozen=True)
class Batch:
    """Texts with the target's inner states, to train on.

    Attributes:
        ids: int64 [B, T].
        mask: Tokens that a loss may be taken on, bool [B, T].
        features: The target's inner states at each token.
        target_logits: The target's logits at each token [B, T, V], so ``target_logits[:, i]`` is
            the law of ``x_{i+1}``.
        generator: Source of noise and sampling in a loss.
        past: The target's cached keys and values of these tokens, for drafters that read them.
        progress: Share of the training that is over, 0 to 1.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    features: Features
    target_logits: torch.Tensor
    generator: torch.Generator
    past: Any = None
    progress: float = 0.0

    @property
    def final(self) -> torch.Tensor:
        """``f_i``, the target's last hidden states [B, T, D]."""
        assert self.features.final is not None
        return self.features.final

    def before(self, k: int) -> torch.Tensor:
        """The mask without the last k tokens, whose labels lie beyond the end; bool [B, T]."""
        mask = self.mask.clone()
        if k:
            mask[:, -k:] = False
        return mask


class TrainedDrafter(nn.Module):
    """Base of the drafters that are trained for one target.

    Embedding and head of the target are used as they are, never copied or saved.

    Args:
        target: The target. TableTargets have no inner states.
        settings: The system's settings.

    Raises:
        UnsupportedModelError: The target's logits are not its head times its last hidden state, or
            it keeps a recurrent state.
    """

    role: ClassVar[str] = "drafter"
    name = ""
    settings_type: ClassVar[type]
    taps: Taps = Taps(final=True)
    reads_cache: ClassVar[bool] = False  # whether a loss wants the target's keys and values
    session: Any = None  # the target at work, as of the last call

    def __init__(self, target: HubTarget, settings: Any = None) -> None:
        super().__init__()
        self.settings = self.settings_type() if settings is None else settings
        self.target = target
        self.sizes = LayerSizes.of(target.config)
        self.training_record: dict[str, Any] = {}
        self.stop_rule: Callable[[torch.Tensor], bool] | None = None  # a policy may set one
        self._ready: torch.Tensor | None = None
        self._check_target()

    # what a system fills in ------------------------------------------------------------------

    def loss(self, batch: Batch) -> torch.Tensor:
        """Training loss, a scalar."""
        raise NotImplementedError

    def reset(self, batch: int) -> None:
        """Begin with B rows and an empty state."""
        raise NotImplementedError

    def absorb(self, fresh: Fresh) -> None:
        """Take in verified tokens; rows without any keep their state."""
        raise NotImplementedError

    def expand(self, level: Level) -> torch.Tensor:
        """Logits [B, F, V] of the children of a level's nodes; depth 0 is the root alone."""
        raise NotImplementedError

    def select_state(self, rows: torch.Tensor) -> None:
        """Keep the state of the given rows, int64 [R]."""
        raise NotImplementedError

    @property
    def default_shape(self) -> Shape:
        """The paper's draft."""
        raise NotImplementedError

    # the loop ---------------------------------------------------------------------------------

    @classmethod
    def for_model(cls, model: Any, settings: Any = None) -> Self:
        """Refuse to draft untrained.

        Raises:
            InvalidInputError: Always; a folder made by ``isthmus train`` is loaded instead.
        """
        raise InvalidInputError(
            f"{cls.name} has to be trained for its target first: isthmus train {cls.name} "
            "--target MODEL --out FOLDER, then --drafter FOLDER"
        )

    @torch.no_grad()
    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Take in the prompts.

        Raises:
            MismatchError: The drafter was made for another target.
        """
        if target is not self.target:
            raise MismatchError(
                f"this {self.name} drafter is bound to another target; load it with "
                f"{type(self).__name__}.from_pretrained(folder, target)"
            )
        self.eval()
        self.session = context.session
        self.reset(context.batch)
        self._ready = torch.zeros(context.batch, dtype=torch.bool, device=self.target.device)
        features = context.features
        if features is None:  # prompts of one token: nothing has features yet
            return
        device = self.target.device
        counts = torch.tensor([n - 1 for n in context.lengths], device=device)
        width = int(counts.max())
        ids = context.ids[:, : width + 1].to(device)
        valid = torch.arange(width, device=device) < counts[:, None]
        self._absorb(Fresh(ids[:, :-1], ids[:, 1:], features, valid))

    @torch.no_grad()
    def observe(self, step: Step) -> None:
        """Catch up with the accepted path and its true features."""
        assert step.features is not None
        self.session = step.context.session
        path = step.verdict.path
        index, valid = path.clamp(min=0), path >= 0
        tokens = step.tree.tokens.gather(1, index)  # root and accepted nodes
        final = step.verdict.token[:, None]
        following = torch.cat([tokens[:, 1:], final], 1)
        last = valid.sum(1, keepdim=True) - 1
        following = following.scatter(1, last, final)

        def take(x: torch.Tensor) -> torch.Tensor:
            return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

        self._absorb(Fresh(tokens, following, step.features.map(take), valid))

    def _absorb(self, fresh: Fresh) -> None:
        assert self._ready is not None
        self.absorb(fresh)
        self._ready = self._ready | fresh.valid.any(1)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the given rows."""
        assert self._ready is not None
        index = torch.tensor(list(rows), device=self._ready.device)
        self._ready = self._ready[index]
        self.select_state(index)

    @torch.no_grad()
    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """A chain where the shape asks for one, else a best-first tree."""
        assert self._ready is not None
        self.session = context.session
        roots = context.roots().to(self.target.device)
        depth = min(shape.depth, shape.nodes, self.max_depth)
        if depth < 1 or not bool(self._ready.any()):
            return TokenTree.root(roots)
        if shape.width == 1 or shape.nodes == 1:
            tree = self._chain(context, roots, depth)
        else:
            tree = self._tree(roots, shape.capped(shape.nodes, depth))
        if not bool(self._ready.all()):
            keep = self._ready[:, None].expand(-1, tree.nodes).clone()
            keep[:, 0] = True
            tree = tree.prune(keep, closed=True)
        return tree

    @property
    def max_depth(self) -> int:
        """Levels that the drafter can draft."""
        return 1_000

    def branch(self) -> tuple[int, int]:
        """Children of a node, and nodes expanded on a level, of a best-first tree."""
        return 10, 10

    def stops(self, logits: torch.Tensor) -> bool:
        """Whether a chain ends here, before the next token is drawn from logits [B, V]."""
        return self.stop_rule is not None and self.stop_rule(logits)

    def _chain(self, context: Context, roots: torch.Tensor, depth: int) -> TokenTree:
        level = Level(
            roots[:, None], torch.zeros_like(roots)[:, None], torch.zeros(len(roots), 1), 0
        )
        drafted = roots.new_zeros(len(roots), 0)
        laws = []
        for step in range(depth):
            logits = self.expand(level)[:, 0].float()
            if step and self.stops(logits):
                break
            law = chain_logits(logits, context, drafted)
            token, q = draw_next(law, context, [n + step for n in context.lengths])
            if q is not None:
                laws.append(q)
            drafted = torch.cat([drafted, token], 1)
            level = Level(token, torch.zeros_like(token), level.score, step + 1)
        return TokenTree.chain(roots, drafted, q=torch.stack(laws, 1) if laws else None)

    def _tree(self, roots: torch.Tensor, shape: Shape) -> TokenTree:
        """The best nodes by path probability (EAGLE-2, 2406.16858): a chosen tree."""
        branch, keep = self.branch()
        growth = Growth(roots, shape.nodes)
        for _ in range(shape.depth):
            logp = torch.log_softmax(self.expand(growth.level).float(), -1)
            level = growth.add(logp, branch=min(branch, shape.width), keep=keep)
            if level.tokens.shape[1] == 0:
                break
        return growth.tree()

    # the target's ends ------------------------------------------------------------------------

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The target's frozen input embeddings [..., D]."""
        return self.target.embed(tokens).detach()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """The target's frozen head: logits [..., V] of states that imitate its last ones."""
        if torch.is_grad_enabled():  # no gradient is kept for what stays as it is
            module = self.target.model.get_output_embeddings()
            frozen = {name: p.detach() for name, p in module.named_parameters()}
            logits: torch.Tensor = torch.func.functional_call(module, frozen, (hidden,))
        else:
            logits = self.target.head(hidden)
        return logits if self._head_scale == 1.0 else logits * self._head_scale

    def _check_target(self) -> None:
        target = self.target
        if target.recurrent:
            raise UnsupportedModelError(
                f"{type(target.model).__name__} keeps a recurrent state; {self.name} needs a "
                "target of attention layers only"
            )
        tokens = torch.tensor([[1, 2, 3]], device=target.device)
        inputs = target.probe_inputs()
        encoded = target.encode(**inputs) if inputs else None
        scores = target.forward(tokens, encoded=encoded, taps=Taps(final=True))
        assert scores.features is not None and scores.features.final is not None
        with torch.no_grad():
            logits = target.head(scores.features.final)
        # T5 with tied embeddings scales what it hands to its head
        scale = float((logits * scores.logits).sum() / logits.square().sum())
        self._head_scale = 1.0 if abs(scale - 1.0) < 1e-2 else scale
        off = (logits * self._head_scale - scores.logits).abs().max()
        if float(off) > 1e-2 * float(scores.logits.abs().max() + 1e-3):
            raise UnsupportedModelError(
                f"the logits of {type(target.model).__name__} are more than its head times its "
                f"last hidden state, which {self.name} does not support"
            )

    # files ------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``isthmus.json`` and ``model.safetensors``, replacing an older drafter as a whole.

        Args:
            folder: Where to; made if need be.

        Raises:
            InvalidInputError: The folder holds something else.
            BrokenFileError: It cannot be written.
        """
        folder = Path(folder)
        check_replaceable(folder)
        with published(folder) as part:
            weights = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
            save_file(weights, part / WEIGHTS, metadata={"format": "pt"})
            config = {
                "system": self.name,
                "settings": asdict(self.settings),
                "target": target_fingerprint(self.target),
                "sha256": digest(part / WEIGHTS),
                "training": self.training_record,
            }
            (part / CONFIG).write_text(json.dumps(config, indent=1))

    @classmethod
    def from_pretrained(cls, folder: str | Path, target: HubTarget) -> Self:
        """Read a drafter and bind it to its target.

        Raises:
            BrokenFileError: A file is missing, truncated or altered.
            MismatchError: It was trained for another target, or is another system.
        """
        config = read_config(folder)
        if config["system"] != cls.name:
            raise MismatchError(f"{folder} holds a {config['system']} drafter, not {cls.name}")
        if config["target"] != target_fingerprint(target):
            raise MismatchError(
                f"the drafter in {folder} was trained for another target; train one for this model "
                f"with: isthmus train {cls.name} --target MODEL"
            )
        weights = Path(folder) / WEIGHTS
        try:
            if digest(weights) != config["sha256"]:
                raise BrokenFileError(
                    f"{weights} was altered or cut short; train the drafter again"
                )
            tensors = load_file(weights)
            settings = cls.settings_type(**tuples(config["settings"]))
            drafter = cls(target, settings).to(target.device, target.state_dtype)
            drafter.load_state_dict(tensors)
        except (OSError, SafetensorError, TypeError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise BrokenFileError(f"the drafter in {folder} cannot be read ({first})") from error
        drafter.training_record = config.get("training", {})
        return drafter.to(target.device, target.state_dtype).eval()


def read_config(folder: str | Path) -> dict[str, Any]:
    """The ``isthmus.json`` of a drafter's folder.

    Raises:
        BrokenFileError: It is missing or no drafter's.
    """
    fields = ("system", "settings", "target", "sha256")
    return folders.read_record(Path(folder) / CONFIG, fields, "drafter")


def check_replaceable(folder: Path) -> None:
    """Refuse a folder whose loss would be felt.

    Raises:
        InvalidInputError: It holds files and no drafter.
    """
    folders.check_replaceable(folder, (CONFIG,), "drafter")


def target_fingerprint(target: HubTarget) -> str:
    """What tells one target from another: sizes, and a few rows of its embedding and head.

    The same for every dtype that a bfloat16 checkpoint is loaded in.
    """
    config = target.config
    words = [config.model_type, target.vocab_size, target.hidden_size, target.num_layers]
    state = hashlib.sha256(json.dumps(words).encode())
    for table in (target.model.get_input_embeddings(), target.model.get_output_embeddings()):
        rows = table.weight.detach()
        some = rows[:: max(1, len(rows) // 64)].to("cpu", torch.bfloat16)
        state.update(some.contiguous().view(torch.int16).numpy().tobytes())
    return state.hexdigest()[:16]
