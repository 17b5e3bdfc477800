"""Bits that a model needs for a text."""

from __future__ import annotations

import math

from isthmus.errors import InvalidInputError


def bits_per_byte(nats: float, size: int) -> float:
    """Length of a text under a model, in bits for each of its bytes.

    Texts of unlike tokenizers compare in this unit: a token's loss is spread over its bytes.

    Args:
        nats: Negative log-likelihood of the whole text, in nats.
        size: Its bytes in UTF-8; padding is not among them.

    Returns:
        ``nats / ln 2 / size``.

    Raises:
        InvalidInputError: The text has no bytes.

    Example:
        >>> round(bits_per_byte(10 * math.log(256), 10), 6)  # ten bytes, each as likely as another
        8.0
    """
    if size < 1:
        raise InvalidInputError("a text without bytes has no bits per byte")
    return nats / math.log(2) / size
