"""A text as two halves, a short dense vector and its words, and how both are pretrained.

::

    first state ──linear──▶ dense [B, E], length 1          pretrained to rebuild the text
    other states ──head──max──log(1 + u)──▶ sparse [B, V]   pretrained to predict the bag of words

After Xiao et al., "RetroMAE v2", 2022 (arXiv 2211.08769).

>>> halves(torch.tensor([[0.0, 3.0, -5.0]]), terms=1)
tensor([[0., 1., 0.]])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from isthmus.errors import InvalidInputError
from isthmus.models.bottleneck import EnhancedDecoder, bag_loss, enhanced_mask, word_scores
from isthmus.models.embedder import Dense

Search = Literal["both", "dense", "sparse"]


def halves(scores: torch.Tensor, terms: int) -> torch.Tensor:
    """Scores u [B, V] as the sparse half: ``log(1 + u)`` of the largest ones, length 1.

    What they are trained by, a softmax, leaves their level open: zero is the first one left out.

    Args:
        scores: u.
        terms: How many are kept.
    """
    if terms < scores.shape[1]:
        scores = scores - scores.detach().topk(terms + 1).values[:, -1:]
    return F.normalize(scores.clamp(min=0).log1p(), dim=-1)


def corrupted(
    ids: torch.Tensor,
    present: torch.Tensor,
    words: torch.Tensor,
    *,
    mask_id: int,
    vocab_size: int,
    encoder_rate: float = 0.3,
    decoder_rate: float = 0.5,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """A batch of pretraining: whole words hidden from the encoder, places from the decoder.

    Of ten hidden tokens eight are shown as the mask, one as any token and one as it is (Devlin et
    al., "BERT", 2018, arXiv 1810.04805, section 3.1), so that shown tokens are learnt, too.

    Args:
        ids: Tokens [B, T].
        present: Which are no padding, bool [B, T].
        words: Number of the word that a token belongs to, int64 [B, T]; -1 is never hidden.
        mask_id: The mask.
        vocab_size: Tokens.
        encoder_rate: Share of words hidden.
        decoder_rate: See :func:`~isthmus.models.bottleneck.enhanced_mask`.
        generator: Source of the draws.

    Example:
        >>> batch = corrupted(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool),
        ...                   torch.tensor([[-1, 0, 0]]), mask_id=1, vocab_size=9, encoder_rate=1.0)
        >>> batch["hidden"].tolist()
        [[False, True, True]]
    """
    drawn = torch.rand(len(ids), int(words.max()) + 2, generator=generator)
    hidden = (drawn.gather(1, words + 1) < encoder_rate) & (words >= 0)
    roll = torch.rand(ids.shape, generator=generator)
    others = torch.randint(vocab_size, ids.shape, generator=generator)
    shown = torch.where(hidden & (roll < 0.9), others, ids).masked_fill(
        hidden & (roll < 0.8), mask_id
    )
    return {
        "ids": ids,
        "present": present,
        "hidden": hidden,
        "shown": shown,
        "seen": enhanced_mask(present, decoder_rate, generator=generator),
    }


class DuplexEncoder(nn.Module):
    """Encoder with its head, the weak decoder, and the layer that shortens the first token.

    Args:
        vocab_size: Tokens V; id 0 pads.
        dimension: Numbers E of the dense half.
        terms: Largest values of the sparse half that are kept.
        hidden_size: Width D.
        num_layers: Layers.
        num_heads: Attention heads.
        max_length: Longest text in tokens.
        decoder: Whether the first token has to rebuild the text.
        bag: Whether the other tokens have to predict the bag of words.
        search: Halves of the vector that are searched with.

    Raises:
        InvalidInputError: There is no such half.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        dimension: int,
        terms: int = 384,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        max_length: int = 512,
        decoder: bool = True,
        bag: bool = True,
        search: Search = "both",
    ) -> None:
        super().__init__()
        if search not in get_args(Search):
            raise InvalidInputError(f"search must be both, dense or sparse, got {search!r}")
        self.rebuilds, self.bag, self.search, self.terms = decoder, bag, search, terms
        width = hidden_size
        self.lm: Any = transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=vocab_size,
                hidden_size=width,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                intermediate_size=4 * width,
                max_position_embeddings=max_length,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                pad_token_id=0,
                # 0.02 is for 768: narrower, the first token would hardly hear the others
                initializer_range=0.02 * (768 / width) ** 0.5,
            )
        )
        self.decoder = EnhancedDecoder(width, num_heads)
        self.dense = Dense(width, dimension, bias=False)

    @property
    def common(self) -> torch.Tensor:
        """Score [V] that a word has in any text: the bias of the head."""
        bias: torch.Tensor = self.lm.cls.predictions.decoder.bias
        return bias

    def begin(self, ids: torch.Tensor) -> None:
        """Begin with the law of single words, which is then not to be learnt by all layers.

        Args:
            ids: Tokens of texts, int64 [N].
        """
        counts = ids.bincount(minlength=len(self.common)).double() + 1
        self.common.data.copy_((counts / counts.sum()).log())

    @torch.no_grad()
    def whiten(
        self, texts: Sequence[str], read: Callable[[Sequence[str]], tuple[torch.Tensor, ...]]
    ) -> None:
        """Let the dense half begin with the main directions of the first token, each alike strong.

        A few directions that most texts share would else decide all scores, and tuning would first
        learn to be rid of them and of what tells texts apart.

        Args:
            texts: Some texts, more than there are directions.
            read: Ids [B, T] of texts, and which are no padding.
        """
        weight = self.dense.linear.weight
        parts = [read(texts[i : i + 100])[:2] for i in range(0, len(texts), 100)]
        states = [self.states(*(x.to(weight.device) for x in part))[:, 0] for part in parts]
        first = torch.cat(states).double()
        values, vectors = torch.linalg.eigh(first.T @ first / len(first))
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        # what hardly varies is noise, which must not be made loud
        rows = (vectors / (values + 1e-5 * values.sum()).sqrt()).T[: len(weight)]
        weight.copy_(rows * (len(weight) ** 0.5 / rows.norm()))

    def states(self, ids: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """States [B, T, D] of tokens [B, T]."""
        out = self.lm.bert(input_ids=ids, attention_mask=present.long())
        found: torch.Tensor = out.last_hidden_state
        return found

    def vectors(self, ids: torch.Tensor, present: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Dense [B, E] and sparse half [B, V] of texts; one that is not searched with is empty."""
        states, which = self.states(ids, present), self.search
        dense = states.new_zeros(len(ids), 0)
        sparse = dense
        if which != "sparse":
            dense = F.normalize(self.dense(states[:, 0]), dim=-1)
        if which != "dense":
            counted = present.clone()
            counted[:, 0] = False
            sparse = halves(word_scores(states, counted, self.lm.cls) - self.common, self.terms)
        return dense, sparse

    @torch.no_grad()
    def encode(
        self,
        texts: Sequence[str],
        read: Callable[[Sequence[str]], tuple[torch.Tensor, ...]],
        *,
        size: int = 64,
    ) -> tuple[np.ndarray[Any, Any], list[dict[str, float]]]:
        """Dense halves [N, E], and sparse halves as bags for an index of weights.

        Args:
            texts: Texts; those of like lengths are read together.
            read: Ids [B, T] of texts, and which are no padding.
            size: Texts at a time.

        Returns:
            A half that is not searched with is zeros, or empty bags.
        """
        device = self.dense.linear.weight.device
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        dense = np.zeros((len(texts), self.dense.linear.out_features), np.float32)
        sparse: list[dict[str, float]] = [{} for _ in texts]
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            ids, present = (part.to(device) for part in read([texts[i] for i in rows])[:2])
            left, right = self.vectors(ids, present)
            if left.shape[1]:
                dense[rows] = left.cpu().numpy()
            if right.shape[1]:
                top = right.topk(min(self.terms, right.shape[1]))
                for i, *kept in zip(rows, top.values.tolist(), top.indices.tolist(), strict=True):
                    sparse[i] = {str(t): v for v, t in zip(*kept, strict=True) if v > 0}
        return dense, sparse

    def losses(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Mean L_e over hidden tokens, L_d over all, and L_b over texts."""
        ids, present, hidden = batch["ids"], batch["present"], batch["hidden"]
        states = self.states(batch["shown"], present)
        counted = present.clone()
        counted[:, 0] = False
        found = {"encoder": _cross_entropy(self.lm.cls(states[hidden]), ids[hidden])}
        if self.rebuilds:
            embed = self.lm.bert.embeddings
            places = embed.position_embeddings.weight[: ids.shape[1]]
            places = F.layer_norm(places, places.shape[-1:])
            rebuilt = self.decoder(states[:, 0], embed(input_ids=ids), places, batch["seen"])
            inside = counted[:, 1:]
            found["decoder"] = _cross_entropy(self.lm.cls(rebuilt[inside]), ids[:, 1:][inside])
        if self.bag:
            scores = word_scores(states, counted, self.lm.cls)
            found["bag"] = bag_loss(scores, ids, counted) / len(ids)
        return found

    def forward(self, batch: Mapping[str, torch.Tensor]) -> Any:
        """:meth:`losses` of a batch of pretraining, else the score of every query and document."""
        if "seen" in batch:
            return self.losses(batch)
        queries, documents = (
            self.vectors(batch[f"{side}_ids"], batch[f"{side}_present"])
            for side in ("query", "document")
        )
        # eq. 10: the dense product and that of the words that both have
        return sum(q @ d.T for q, d in zip(queries, documents, strict=True))


def _cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, ids, reduction="sum") / max(len(ids), 1)
