"""A speech recogniser with an attention decoder: what is heard, then word after word.

::

    features ─▶ Conformer ─┬─▶ CTC of the transcript (training only: it teaches the alignment)
                           └─▶ text decoder with cross-attention ─▶ tokens
"""

from __future__ import annotations

import torch
from torch import nn

from isthmus.models.encoder_decoder import Config, EncoderDecoder, Memory
from isthmus.nn.conformer import Conformer, valid_mask


class SpeechToText(nn.Module):
    """Encoder, CTC head and decoder.

    Args:
        encoder: Of width D.
        vocab: Tokens V; 0 is the blank, and begins and pads the decoder's text. The last one,
            V - 1, ends it.
        layers: Of the decoder.
        heads: Of the decoder.
        dropout: Of the decoder.
        heard: Tokens of CTC, where it has a vocabulary of its own; V when 0.
    """

    def __init__(
        self,
        encoder: Conformer,
        vocab: int,
        layers: int = 3,
        heads: int = 4,
        dropout: float = 0.1,
        heard: int = 0,
    ) -> None:
        super().__init__()
        width = encoder.width
        config = Config(
            vocab,
            width,
            encoder_layers=0,
            decoder_layers=layers,
            num_attention_heads=heads,
            head_dim=width // heads,
            intermediate_size=4 * width,
            norm_place="pre",
            tied=False,
            dropout=dropout,
            end_id=vocab - 1,
        )
        self.encoder, self.text = encoder, EncoderDecoder(config)
        self.ctc = nn.Linear(width, heard or vocab)
        self.end = vocab - 1

    def hear(self, features: torch.Tensor, frames: torch.Tensor) -> tuple[Memory, torch.Tensor]:
        """States, and valid frames [B]."""
        x, lengths = self.encoder(features, frames)
        return Memory(x, valid_mask(lengths, x.shape[1])), lengths

    def encode(
        self, features: torch.Tensor, frames: torch.Tensor
    ) -> tuple[Memory, torch.Tensor, torch.Tensor]:
        """States, log-probabilities [B, T, V] of CTC, and valid frames [B]."""
        memory, lengths = self.hear(features, frames)
        return memory, self.ctc(memory.states).log_softmax(-1), lengths

    def forward(
        self, features: torch.Tensor, frames: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [B, U, V] of the tokens after a target int64 [B, U], and CTC's part."""
        memory, log_probs, lengths = self.encode(features, frames)
        return self.text.decode(target, memory), log_probs, lengths

    @torch.inference_mode()
    def write(
        self, features: torch.Tensor, frames: torch.Tensor, begin: torch.Tensor, longest: int = 24
    ) -> list[list[int]]:
        """Greedy answers.

        Args:
            features: [B, M, F].
            frames: Valid frames [B].
            begin: Tokens that each text begins with, int64 [B, P]; the first is 0.
            longest: Tokens at most, besides those.
        """
        memory = self.hear(features, frames)[0]
        done = torch.zeros_like(begin[:, :1], dtype=torch.bool)
        new, text, written = begin, [begin[:, :0]], self.text.begin()
        for _ in range(longest):
            new = self.text.decode(new, memory, written=written)[:, -1:].argmax(-1)
            text.append(new)
            done |= new == self.end
            if done.all():
                break
        rows = torch.cat(text, 1).tolist()  # what a row has behind its end is no text
        return [row[: row.index(self.end)] if self.end in row else row for row in rows]
