"""Fine-tune a model of transformers with a loss that a system brings along.

For systems that teach the target itself to emit several tokens at once. The order of the texts and
every noise follow from the seed and the step, so two losses can be compared on the same tokens.
:func:`append_groups` builds what such losses share: placeholders that stand behind a prefix inside
a text, see that prefix and themselves, and are seen by nobody else::

    text   x1 x2 x3 x4 x5 x6        position 0 1 2 3 4 5
    group after x2:  m m            position     2 3       learn x4, x5
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from isthmus.errors import DivergedError, InvalidInputError
from isthmus.training.drafting import Recipe
from isthmus.training.seeds import batch_generator

Loss = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
"""From texts int64 [B, T] and a source of noise to a scalar."""

IGNORED = -100
"""Label of a place that no loss is taken on."""

PLACEHOLDER = "isthmus_placeholder_id"
"""Where a tuned model's config says which token is its placeholder."""

_silent: WeakSet[nn.Module] = WeakSet()


def logits_of(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits [B, N, V] of a causal model on tokens [B, N], in float32 or wider."""
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, **inputs).logits
    return logits if logits.dtype == torch.float64 else logits.float()


def label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of logits [B, N, V] over the labels [B, N] that count."""
    total = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (labels != IGNORED).sum().clamp(min=1)


def next_tokens(ids: torch.Tensor) -> torch.Tensor:
    """Labels of plain language modelling: what follows each token [B, T].

    Example:
        >>> next_tokens(torch.tensor([[4, 5, 6]])).tolist()
        [[5, 6, -100]]
    """
    return F.pad(ids[:, 1:], (0, 1), value=IGNORED)


def add_placeholder(model: Any) -> int:
    """Give a model one more token that it can read and never emits.

    It starts as the mean embedding; the config says which it is under :data:`PLACEHOLDER`.

    Returns:
        The token's id: the last row of the vocabulary.
    """
    token = int(model.get_input_embeddings().weight.shape[0])
    model.resize_token_embeddings(token + 1, mean_resizing=False)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[token] = weight[:token].mean(0)
    setattr(model.config.get_text_config(decoder=True), PLACEHOLDER, token)
    silence(model, token)
    return token


def silence(model: Any, token: int) -> None:
    """Set a token's logit to -inf in every forward, by a hook on the model's head."""
    head = model.get_output_embeddings()
    if head in _silent:
        return

    def ban(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, torch.tensor([token], device=output.device), -torch.inf)

    head.register_forward_hook(ban)
    _silent.add(head)


@dataclass(frozen=True)
class Grouped:
    """Texts with groups of placeholders behind them; T text places, then G groups of k.

    Attributes:
        ids: int64 [B, T + G k].
        positions: Place of each token in its text, int64 [B, T + G k].
        mask: Additive attention mask [B, 1, T + G k, T + G k].
        labels: Text tokens that the placeholders learn, int64 [B, G, k]; the j-th one of a group
            after place e stands at e + 1 + j and learns the token at e + 2 + j.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


def append_groups(
    ids: torch.Tensor, ends: torch.Tensor, size: int, filler: int, dtype: torch.dtype
) -> Grouped:
    """Append isolated groups of placeholders to texts.

    Args:
        ids: Texts, int64 [B, T].
        ends: Last place that each group sees, int64 [B, G].
        size: Placeholders k of a group.
        filler: Their token.
        dtype: Float dtype of the mask.

    Raises:
        InvalidInputError: A group has no member, or an end lies outside its text.

    Example:
        >>> g = append_groups(torch.tensor([[4, 5, 6, 7]]), torch.tensor([[1]]), 2, 0, torch.float)
        >>> g.ids.tolist(), g.positions.tolist(), g.labels.tolist()
        ([[4, 5, 6, 7, 0, 0]], [[0, 1, 2, 3, 2, 3]], [[[7, -100]]])
        >>> (g.mask[0, 0, 4:] == 0).int().tolist()
        [[1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 1, 1]]
    """
    b, t = ids.shape
    if size < 1 or int(ends.min()) < 0 or int(ends.max()) >= t:
        raise InvalidInputError(
            f"groups need a size of at least 1 and ends within texts of {t} tokens, got {size}"
        )
    groups = ends.shape[1]
    steps = torch.arange(size, device=ids.device)
    text = torch.arange(t, device=ids.device)
    place = (ends[..., None] + 1 + steps).flatten(1)  # [B, G k]
    positions = torch.cat([text.expand(b, -1), place], 1)
    to_text = text <= ends.repeat_interleave(size, 1)[..., None]  # [B, G k, T]
    owner = torch.arange(groups * size, device=ids.device)
    same = (owner[:, None] // size == owner // size) & (owner[:, None] >= owner)
    seen = torch.zeros(b, t + len(owner), t + len(owner), dtype=torch.bool, device=ids.device)
    seen[:, :t, :t] = text[:, None] >= text
    seen[:, t:, :t] = to_text
    seen[:, t:, t:] = same
    mask = torch.zeros(seen.shape, dtype=dtype, device=ids.device)
    mask.masked_fill_(~seen, torch.finfo(dtype).min)
    learnt = place + 1
    known = ids.gather(1, learnt.clamp(max=t - 1))
    labels = torch.where(learnt < t, known, IGNORED).view(b, groups, size)
    fill = ids.new_full((b, len(owner)), filler)
    return Grouped(torch.cat([ids, fill], 1), positions, mask[:, None], labels)


def tune(
    model: Any,
    texts: torch.Tensor,
    loss: Loss,
    recipe: Recipe,
    report: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train all weights of a model in place.

    Args:
        model: A causal model of transformers in float32; in eval mode again afterwards.
        texts: Training texts, int [W, T].
        loss: Taken on batches of them.
        recipe: Steps, batch size, rate and seed.
        report: Called with the steps taken and the last loss.

    Returns:
        The loss of every step.

    Raises:
        InvalidInputError: There are no texts.
        DivergedError: The loss is not finite.
    """
    if texts.ndim != 2 or len(texts) == 0:
        raise InvalidInputError(f"texts must be [texts, tokens], got {list(texts.shape)}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    device = parameters[0].device
    model.train()
    losses: list[float] = []
    for step, rows in enumerate(_batches(len(texts), recipe)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        generator = batch_generator(recipe.seed, step, device)
        value = loss(texts[rows].long().to(device), generator)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
        if not np.isfinite(losses[-1]):
            raise DivergedError(
                f"the loss is {losses[-1]} at step {step}; use a lower learning rate"
            )
        if report is not None:
            report(step + 1, losses[-1])
    model.eval()
    return losses


def _batches(count: int, recipe: Recipe) -> Iterator[list[int]]:
    """Rows of every step: each epoch a new order that follows from the seed."""
    orders: dict[int, np.ndarray[Any, Any]] = {}
    for step in range(recipe.steps):
        rows = []
        for index in range(step * recipe.batch_size, (step + 1) * recipe.batch_size):
            epoch, place = divmod(index, count)
            if epoch not in orders:
                orders[epoch] = np.random.default_rng([recipe.seed, epoch]).permutation(count)
            rows.append(int(orders[epoch][place]))
        yield rows


@torch.no_grad()
def held_out_loss(model: Any, texts: torch.Tensor, *, rows: int = 256) -> float:
    """Nats per token of a causal model on at most ``rows`` texts, int [W, T]."""
    chosen = texts[:rows].long()
    total = 0.0
    with _evaluating(model):
        for start in range(0, len(chosen), 32):
            part = chosen[start : start + 32]
            total += float(label_loss(logits_of(model, part), next_tokens(part))) * len(part)
    return total / len(chosen)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
