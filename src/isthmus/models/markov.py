"""Markov transformers: encoder-decoders that predict from any number of tokens up to M.

The decoder's text is cut by barriers into blocks of M + 1 slots. Attention is causal within a block
and never crosses a barrier, and the first slot of a block holds the start token instead of the
token before it, so that slot j of a block predicts from exactly j tokens (Deng and Rush 2020,
section 4). With barriers at random places one model learns every order from 0 to M at once.

::

    order 2      target     a    b    c    d    e    f
    offset 1     input    start start  b    c  start  e
                 block      0    1    1    1    2    2
                 sees       -    -    b    bc   -    e

Any encoder-decoder of transformers is one that takes a four-dimensional mask in the decoder and has
been trained this way; its config says so by ``markov_order``. The same layout scores many n-grams
in one forward, each in a block of its own at its true place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from isthmus.errors import UnsupportedModelError
from isthmus.nn.masks import additive
from isthmus.roles import Loss

IGNORED = -100
"""Label of a slot without a loss."""


def blocks(length: int, order: int, offset: torch.Tensor) -> torch.Tensor:
    """The block of every slot.

    Args:
        length: Slots L.
        order: M; blocks are M + 1 slots long.
        offset: First slot of the first whole block, 0 to M, int64 [R].

    Returns:
        int64 [R, L]; a block that begins before slot 0 is cut there.

    Example:
        >>> blocks(6, 2, torch.tensor([0, 1])).tolist()
        [[1, 1, 1, 2, 2, 2], [0, 1, 1, 1, 2, 2]]
    """
    size = order + 1
    place = torch.arange(length, device=offset.device)
    return (place + size - offset[:, None]) // size


def within(block: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Additive mask [R, 1, L, L] of who sees whom: causal within a block, int64 [R, L]."""
    same = block[:, :, None] == block[:, None, :]
    return additive(same & torch.ones_like(same[0]).tril(), dtype)


def barred(tokens: torch.Tensor, block: torch.Tensor, start: int) -> torch.Tensor:
    """Decoder inputs in which every block begins with the start token.

    Args:
        tokens: Text after its start token, as for plain teacher forcing, int64 [R, L].
        block: As :func:`blocks` gives it.
        start: The start token.
    """
    first = F.pad(block[:, 1:] != block[:, :-1], (1, 0), value=True)
    return torch.where(first, start, tokens)


def markov_loss(
    model: Any,
    source: torch.Tensor,
    mask: torch.Tensor,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    offset: torch.Tensor,
    *,
    order: int,
    label_smoothing: float = 0.1,
) -> Loss:
    """Cross-entropy of a text of which every slot sees at most M tokens.

    Args:
        model: An encoder-decoder.
        source: int64 [B, S].
        mask: 1 where the source is no padding, [B, S].
        tokens: Decoder inputs of plain teacher forcing, int64 [B, L].
        labels: What follows each of them, :data:`IGNORED` where nothing counts, int64 [B, L].
        offset: Drawn uniformly from 0 to M for each row, int64 [B].
        order: M; from L - 1 on, with offset 0, this is the loss of a plain decoder.
        label_smoothing: Mass spread over all tokens.
    """
    block = blocks(tokens.shape[1], order, offset)
    logits = model(
        input_ids=source,
        attention_mask=mask,
        decoder_input_ids=barred(tokens, block, model.config.decoder_start_token_id),
        decoder_attention_mask=within(block, model.dtype),
        use_cache=False,
    ).logits
    total = F.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten(),
        label_smoothing=label_smoothing,
        reduction="sum",
        ignore_index=IGNORED,
    )
    return Loss(total, (labels != IGNORED).sum())


def ngram_logprobs(
    model: Any, encoded: torch.Tensor, mask: torch.Tensor, ngrams: torch.Tensor
) -> torch.Tensor:
    """Log-probabilities of the token after each n-gram, in one forward.

    Args:
        model: A Markov transformer of order n or more.
        encoded: States of the source, float [B, S, D].
        mask: 1 where the source is no padding, [B, S].
        ngrams: K n-grams at each of P places, int64 [B, P, K, n]; those of place p are the tokens
            p to p + n - 1 of the text, and token p + n is asked for.

    Returns:
        Float32 [B, P, K, V].
    """
    batch, places, count, order = ngrams.shape
    size, length = order + 1, places + order
    offset = torch.arange(size, device=ngrams.device)
    # every n-gram has a block [start, tokens] in one of n + 1 rows: place p in row p mod (n + 1)
    slot = torch.arange(length, device=ngrams.device)
    inside = (slot - offset[:, None]) % size  # [n + 1, L]
    place = (slot - inside).clamp(0, places - 1)  # cut blocks hold some n-gram; nobody reads them
    starting = F.pad(ngrams, (1, 0), value=model.config.decoder_start_token_id)
    rows = starting.transpose(1, 2)[:, :, place, inside]  # [B, K, n + 1, L]
    seen = within(blocks(length, order, offset), encoded.dtype)
    times = count * size
    logits = model(
        encoder_outputs=(encoded.repeat_interleave(times, 0),),
        attention_mask=mask.repeat_interleave(times, 0),
        decoder_input_ids=rows.flatten(0, 2),
        decoder_attention_mask=seen.repeat(batch * count, 1, 1, 1),
        use_cache=False,
    ).logits.view(batch, count, size, length, -1)
    where = torch.arange(places, device=ngrams.device)
    asked = logits[:, :, where % size, where + order]  # [B, K, P, V]
    return torch.log_softmax(asked.float(), -1).transpose(1, 2)


@torch.no_grad()
def check_barriers(model: Any) -> int:
    """Make sure that nothing crosses a barrier in this model's decoder, by a probe.

    Args:
        model: A Markov transformer.

    Returns:
        Its order M.

    Raises:
        UnsupportedModelError: It says no ``markov_order``, or does not keep to the mask.
    """
    order = getattr(model.config, "markov_order", None)
    name = type(model).__name__
    if not isinstance(order, int) or order < 0:
        raise UnsupportedModelError(
            f"this {name} says no markov_order in its config; train it with "
            "isthmus.models.markov.markov_loss and set it"
        )
    tokens = torch.tensor([[0, 0, 0], [0, 1, 0]], device=model.device)
    block = torch.tensor([[0, 0, 1]] * 2, device=model.device)
    logits = model(
        input_ids=torch.zeros_like(tokens),
        decoder_input_ids=tokens,
        decoder_attention_mask=within(block, model.dtype),
        use_cache=False,
    ).logits
    behind, before = (logits[0] - logits[1]).abs().amax(-1)[1:].tolist()[::-1]
    if behind > 1e-3 * before:
        raise UnsupportedModelError(
            f"this {name} does not keep to a four-dimensional decoder mask; use one that does, "
            "such as MBart or Bart"
        )
    return order
