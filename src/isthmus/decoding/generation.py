"""What decoding gives back: text, tokens, a trace of every round and where the time went."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from isthmus.roles import Hypothesis, RoundTrace


@dataclass
class Stats:
    """Counts and clocks of one request (of its whole batch, for the clocks, set at its end).

    Attributes:
        new_tokens: Tokens emitted.
        target_forwards: Forwards of the target after the prefill.
        drafted: Draft tokens scored.
        accepted: Draft tokens accepted.
        seconds: Wall time from the prefill to the last token.
        parts_s: Seconds of each part: ``prefill``, ``draft``, ``score``, ``accept``, ``commit``
            and ``observe``.
    """

    new_tokens: int = 0
    target_forwards: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    parts_s: dict[str, float] = field(default_factory=dict)

    @property
    def acceptance_length(self) -> float:
        """Mean tokens emitted per target forward, bonus token counted; 1 is plain decoding."""
        return self.new_tokens / max(1, self.target_forwards)

    @property
    def acceptance_rate(self) -> float:
        """Share of the draft tokens that were accepted."""
        return self.accepted / max(1, self.drafted)

    @property
    def tokens_per_s(self) -> float:
        """Tokens emitted per second, prefill included."""
        return self.new_tokens / max(self.seconds, 1e-9)

    @property
    def overhead(self) -> float:
        """Share of the time after the prefill that is neither the target nor drafting."""
        own = sum(self.parts_s.get(k, 0.0) for k in ("accept", "commit", "observe"))
        after = self.seconds - self.parts_s.get("prefill", 0.0)
        return own / max(after, 1e-9)

    def line(self) -> str:
        """One line for a terminal."""
        return (
            f"{self.new_tokens} tokens in {self.seconds:.2f} s "
            f"({self.tokens_per_s:.1f} tokens/s), {self.target_forwards} target forwards, "
            f"acceptance length {self.acceptance_length:.2f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "new_tokens": self.new_tokens,
            "target_forwards": self.target_forwards,
            "acceptance_length": round(self.acceptance_length, 4),
            "drafted": self.drafted,
            "accepted": self.accepted,
            "seconds": round(self.seconds, 6),
            "tokens_per_s": round(self.tokens_per_s, 3),
            "parts_s": {k: round(v, 6) for k, v in self.parts_s.items()},
        }


@dataclass
class Generation:
    """The answer to one prompt.

    Attributes:
        text: Decoded new text, cut before a stop string; empty without a tokenizer.
        tokens: New token ids; the token that completed a stop string is included.
        prompt_tokens: Tokens of the prompt.
        finish_reason: ``"stop"`` (end token or stop string), ``"length"`` (budget or context
            limit), ``"criteria"`` (a stopping criterion of transformers), ``"interrupted"``, or
            ``"error"`` (one of many prompts could not be answered; the notes say why).
        lossless: Whether the output keeps the target's law exactly.
        drafter: Name of the drafter asked for.
        rounds: One entry per round.
        stats: Counts and clocks.
        notes: What a user should know, for example that drafting was not possible.
        hypotheses: All answers that a search found, best first; empty without one.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    finish_reason: str = ""
    lossless: bool = True
    drafter: str = "none"
    rounds: list[RoundTrace] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    notes: list[str] = field(default_factory=list)
    hypotheses: list[Hypothesis] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: everything but the drafted tokens of each round."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "finish_reason": self.finish_reason,
            "lossless": self.lossless,
            "drafter": self.drafter,
            "stats": self.stats.to_dict(),
            "rounds": [
                {
                    "drafter": r.drafter,
                    "nodes": r.nodes,
                    "accepted": r.accepted,
                    "emitted": r.emitted,
                }
                for r in self.rounds
            ],
            "notes": self.notes,
            "hypotheses": [
                {"tokens": list(h.tokens), "logprob": h.logprob, "score": h.score}
                for h in self.hypotheses
            ],
        }
