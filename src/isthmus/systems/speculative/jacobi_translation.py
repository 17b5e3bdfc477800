"""Parallel decoding: the target's own guesses about the next tokens, put right round by round.

Paper: Santilli, Severino, Postolache, Maiorca, Mancusi, Marin, Rodola. Accelerating Transformer
    Inference for Translation via Parallel Decoding. 2023. arXiv:2305.10427
Idea: Greedy decoding solves y_i = argmax p(. | y_<i, x) one unknown at a time; Jacobi iteration
    solves a whole window of them at once, and each round's argmaxes are the next round's guesses.
Differs: In the loop the window slides: a token that is fixed leaves it at once and its keys are
    kept, where the paper waits for a block to converge (``sliding=False`` keeps its blocks). The
    paper's algorithms as they stand are ``solve``.
Lossless: yes

    guesses [B, W] ──chain──> target ──argmax──> what agrees is fixed, the rest are new guesses
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from isthmus.claims import Claim, Gate, Row, Ruler, Scale, judge, ratio
from isthmus.decoding.model import Model
from isthmus.decoding.policy import Fixed
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError, require
from isthmus.roles import Context, Shape, Step, Target
from isthmus.workbench import dates, pycode
from isthmus.workbench.bench import Answers, answer, reference_model, repeats_itself


@dataclass(frozen=True)
class Settings:
    """Settings of parallel decoding.

    Attributes:
        window: Guesses a round; the paper's block size b.
        sliding: Guess past the end of a block as soon as its first tokens are fixed; off, blocks
            of ``window`` tokens are finished one after the other (PGJ).
        pad: Token of a position that nothing is known about; None takes the model's padding.
        iterate: The mechanism; off, what the target said about the window is forgotten and every
            round starts from padding.
    """

    window: int = 5
    sliding: bool = True
    pad: int | None = None
    iterate: bool = True


class JacobiTranslation:
    """Drafter whose draft is what the target answered to the last one.

    Args:
        settings: See :class:`Settings`.

    Raises:
        InvalidInputError: A window below 1.

    Example:
        >>> JacobiTranslation().default_shape
        Shape(nodes=5, depth=5, width=1)
    """

    role: ClassVar[str] = "drafter"
    name = "jacobi-translation"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        if self.settings.window < 1:
            raise InvalidInputError(f"the window must be at least 1, not {self.settings.window}")
        self.guesses = torch.zeros(0, self.settings.window, dtype=torch.int64)
        self._pad = 0

    @property
    def default_shape(self) -> Shape:
        """A chain of the window's length."""
        return Shape(self.settings.window, self.settings.window, 1)

    def begin(self, context: Context, target: Target, **inputs: Any) -> None:
        """Nothing is known yet: the whole window is padding (y^0)."""
        self._pad = padding(target) if self.settings.pad is None else self.settings.pad
        self.guesses = torch.full((context.batch, self.settings.window), self._pad)

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        """The guesses as a chain below each root [B, 1 + W]."""
        width = min(shape.nodes, shape.depth, self.settings.window)
        roots = context.roots()[:, None]
        tree = TokenTree.chain(roots[:, 0], self.guesses[:, :width])
        if self.settings.sliding:
            return tree
        # a block ends every W tokens; rows may stand at different places of theirs
        done = torch.tensor(context.lengths) - torch.tensor(context.prompt_lengths)
        left = self.settings.window - done % self.settings.window  # [B]
        return tree.prune(torch.arange(width + 1) < left[:, None])

    def observe(self, step: Step) -> None:
        """y_i^{k+1} = argmax p(. | y_<i^k): new guesses for what was not accepted (eq. 5)."""
        window = self.settings.window
        self.guesses = torch.full((step.tree.batch, window), self._pad)
        if not self.settings.iterate or not step.tree.is_chain:
            return
        said = step.logits.argmax(-1).cpu()  # [B, N]: node i speaks about the token after it
        # after a accepted tokens node a gave the next root, node a + 1 speaks about its successor
        place = torch.tensor(step.accepted)[:, None] + 1 + torch.arange(window)  # [B, W]
        known = place < step.tree.alive.sum(1).cpu()[:, None]
        found = said.gather(1, place.clamp(max=said.shape[1] - 1))
        self.guesses = torch.where(known, found, self.guesses)

    def select(self, rows: Sequence[int]) -> None:
        """Keep the guesses of the given rows."""
        self.guesses = self.guesses[list(rows)]


def padding(target: Target) -> int:
    """The token that stands for "nothing known" with a target: its padding, else 0."""
    found = getattr(getattr(target, "config", None), "pad_token_id", None)
    return found if isinstance(found, int) and 0 <= found < target.vocab_size else 0


@dataclass(frozen=True)
class Trajectory:
    """How the answer to one prompt became fixed: the paper's dependency graph as a table.

    Attributes:
        rounds: Guesses after each round, int64 [R, m]; the last row is the answer.
        probs: Probability that the target gave to each of them, float [R, m].
        fixed: Round (from 0) after which each position never changed again, int64 [m].
        steps: Forwards that were needed, those of the one-token steps included.
    """

    rounds: torch.Tensor
    probs: torch.Tensor
    fixed: torch.Tensor
    steps: int

    @property
    def tokens(self) -> list[int]:
        """The answer."""
        return [int(t) for t in self.rounds[-1]]

    def ahead(self) -> torch.Tensor:
        """Cells that were right before everything to their left was, bool [R, m]."""
        right = self.rounds == self.rounds[-1]
        before = right.long().cumprod(1)  # everything up to here is right
        certain = torch.cat([torch.ones_like(before[:, :1]), before[:, :-1]], 1).bool()
        return right & ~certain


@torch.no_grad()
def solve(
    target: Target,
    start: torch.Tensor,
    length: int,
    *,
    block: int | None = None,
    end: int | None = None,
    pad: int | None = None,
    **inputs: Any,
) -> Trajectory:
    """The paper's algorithms on one prompt, with a record of every round.

    ``block=None`` is parallel Jacobi over the whole length (alg. 1, PJ); a number makes blocks
    that are finished one after the other (alg. 2, PGJ), and with ``end`` the first block that
    holds it ends the answer (alg. 3, HGJ).

    Args:
        target: The model.
        start: Committed tokens int64 [T], T >= 1; the last one is the root.
        length: Tokens m to solve for.
        block: Tokens b of a block.
        end: End token, if the answer may stop before ``length``.
        pad: First guess; the model's padding when None.
        inputs: Encoder inputs of one row.

    Raises:
        InvalidInputError: A length below 1, or an empty start.
    """
    if length < 1 or len(start) < 1 or (block is not None and block < 1):
        raise InvalidInputError("solve needs a start token, and a length and block of at least 1")
    device = getattr(target, "device", start.device)
    session = target.session(1, **inputs)
    if len(start) > 1:
        session.prefill([start[:-1]])
    root = start[-1:].to(device)
    first = padding(target) if pad is None else pad
    y = torch.full((length,), first, device=device)
    rounds, probs, shown = [], [], torch.zeros(length, device=device)
    at, size = 0, length if block is None else block
    while at < length:
        stop = min(length, at + size)
        for _ in range(stop - at):  # k rounds fix the first k tokens
            tree = TokenTree.chain(root, y[None, at : stop - 1])
            law = torch.softmax(session.score(tree).logits[0].float(), -1)  # [b, V]
            session.keep(torch.full((1, 0), -1, device=device))
            top = law.max(-1)
            same = torch.equal(top.indices, y[at:stop])
            y, shown = y.clone(), shown.clone()
            y[at:stop], shown[at:stop] = top.indices, top.values
            rounds.append(y)
            probs.append(shown)
            if same:
                break
        block_tokens = y[at:stop]
        if end is not None and bool((block_tokens == end).any()):
            length = at + int((block_tokens == end).nonzero()[0]) + 1
            break
        # the block is final: commit the root and all of it but its last token, the next root
        tree = TokenTree.chain(root, y[None, at : stop - 1])
        if stop < length:
            session.score(tree)
            session.keep(torch.arange(tree.nodes, device=device)[None])
        root, at = y[stop - 1 : stop], stop
    table = torch.stack(rounds)[:, :length].cpu()
    wrong = table != table[-1]
    last = torch.arange(len(table))[:, None].expand_as(wrong)
    fixed = torch.where(wrong, last + 1, 0).amax(0)
    return Trajectory(table, torch.stack(probs)[:, :length].cpu(), fixed, len(rounds))


def picture(trajectory: Trajectory, path: str | Path, tokenizer: Any = None) -> Path:
    """Draw the dependency graph: rounds downwards, positions to the right.

    A filled cell holds its final token, a hatched one did so before everything to its left was
    final, and the line follows the round in which each position became fixed.

    Args:
        trajectory: What :func:`solve` gave.
        path: Where to save; the ending chooses the format.
        tokenizer: Names the tokens; None writes their ids.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure_module = require("matplotlib.figure", "plot")
    patches = require("matplotlib.patches", "plot")
    rounds, width = trajectory.rounds.shape
    figure = figure_module.Figure(figsize=(0.5 * width + 1.2, 0.42 * rounds + 1.0))
    axes = figure.subplots()
    right = trajectory.rounds == trajectory.rounds[-1]
    axes.imshow((right * trajectory.probs).numpy(), cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    ahead = trajectory.ahead()
    for row in range(rounds):
        for column in range(width):
            token = int(trajectory.rounds[row, column])
            name = str(token) if tokenizer is None else tokenizer.decode([token])
            axes.text(column, row, name, ha="center", va="center", fontsize=8)
            if ahead[row, column]:
                corner = (column - 0.5, row - 0.5)
                cell = patches.Rectangle(corner, 1, 1, hatch="//", fill=False, linewidth=0)
                axes.add_patch(cell)
    edges = [-0.5 + i for i in range(width + 1)]
    axes.stairs(trajectory.fixed.numpy() - 0.5, edges, baseline=None, color="black")
    axes.set_xlabel("position")
    axes.set_ylabel("round")
    figure.tight_layout()
    target = Path(path)
    figure.savefig(target)
    return target


def claim(ruler: Ruler, scale: Scale = "small") -> Claim:
    """Measure the paper's claim on an encoder-decoder that reads dates, and on code without one.

    Args:
        ruler: The clock.
        scale: ``"small"`` is 96 dates and 48 code prompts of 24 tokens, ``"test"`` 4 and 2.
    """
    count, prompts, tokens = (96, 48, 24) if scale != "test" else (4, 2, 8)
    model = reference_model("dates", dtype="float64")
    sources = [model.tokenizer.encode(e.source) for e in dates.examples(count)]
    length = len(model.tokenizer.encode(dates.examples(1)[0].target))  # the end token included

    def arm(settings: Settings | None, on: Model, ids: Sequence[list[int]], new: int) -> Answers:
        drafter = None if settings is None else JacobiTranslation(settings)
        policy = Fixed(drafter, drafter.default_shape) if drafter else Fixed()
        return answer(on, ids, policy, max_new_tokens=new)

    plain = arm(None, model, sources, length)
    sizes = (3, 4, 5, 6)
    ours = {b: arm(Settings(window=b), model, sources, length) for b in sizes}
    blocks = {b: arm(Settings(window=b, sliding=False), model, sources, length) for b in sizes}
    off = arm(Settings(iterate=False), model, sources, length)
    same = min(
        sum(x == y for x, y in zip(run.tokens, plain.tokens, strict=True))
        for run in (*ours.values(), *blocks.values(), off)
    )
    worst = max(
        mine - base
        for run in (*ours.values(), *blocks.values())
        for mine, base in zip(run.forwards, plain.forwards, strict=True)
    )
    tau = {b: run.acceptance_length() for b, run in ours.items()}
    tau_blocks = {b: run.acceptance_length() for b, run in blocks.items()}
    tau_off = off.acceptance_length()

    coder = reference_model("pycode-t")
    code = pycode.prompts(prompts, coder.tokenizer, 64)
    code_plain = arm(None, coder, code, tokens)
    code_ours = arm(Settings(), coder, code, tokens)
    straight = [r for r, t in enumerate(code_plain.tokens) if not repeats_itself(t)]
    tau_code = code_ours.acceptance_length(straight or None)

    few = sources[: max(4, count // 8)]
    timed = ruler.compare(
        {
            "plain": lambda: arm(None, model, few, length),
            "ours": lambda: arm(Settings(), model, few, length),
        },
        repeats=3 if scale != "test" else 1,
    )
    speedup = ratio(timed["plain"], timed["ours"])
    identical = Gate("dates with the plain output, every arm", same, "==", count)
    never_worse = Gate("forwards more than greedy, worst date", worst, "<=", 0)
    gates = (
        identical,
        never_worse,
        Gate("acceptance length, dates, worst of b = 3..6", min(tau.values()), ">=", 1.1),
        Gate("dates over code without an encoder", tau[5] / tau_code, ">", 1.0),
        Gate("guesses kept over guesses forgotten", tau[5] / tau_off, ">=", 1.05),
    )
    direction = (
        identical,
        never_worse,
        Gate("acceptance length, dates, best", max(tau.values()), ">", 1.0),
        Gate("guesses kept over guesses forgotten, direction", tau[5] / tau_off, ">", 1.0),
    )
    unit = "tokens/forward"
    return Claim(
        slug="jacobi-translation",
        statement="Guessing a window of tokens and putting it right round by round needs at least "
        "1.1 times fewer forwards than greedy decoding on an encoder-decoder, with the same "
        "output; without a source to decide the output there is next to no gain.",
        paper_figure="up to 38 % faster than greedy on one device (Table 1)",
        rows=(
            *(
                Row(
                    f"acceptance length, dates, sliding window of {b}",
                    unit,
                    1.0,
                    tau[b],
                    tau_off if b == 5 else None,
                    control=tau_blocks[b],
                    note="control: blocks (PGJ)",
                )
                for b in sizes
            ),
            Row("acceptance length, code without an encoder", unit, 1.0, tau_code, None),
            Row(
                "speed-up over plain, window of 5",
                "x",
                1.0,
                speedup.median,
                None,
                note=f"{speedup}, never a gate",
            ),
        ),
        scale=scale,
        device="cpu",
        status=judge(gates, direction),
        notes=(
            f"{prompts - len(straight)} of {prompts} code answers run in loops and are left out.",
        ),
        gates=gates,
        seeds=(0,),
    )
