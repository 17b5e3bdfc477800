"""Rewards for the steps of the ``sums`` task: fitted on first use, cached by what they are.

Steps to learn from come from the training part: what a model writes after a right beginning,
greedily and by chance, and right lines with one digit changed. :func:`isthmus.workbench.sums.\
check_step` says which are right.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

import torch

from isthmus.decoding.relay import Relay
from isthmus.decoding.state_head import StateHead
from isthmus.decoding.trained import target_fingerprint
from isthmus.errors import BrokenFileError, MismatchError
from isthmus.folders import kept
from isthmus.workbench import sums

SYSTEM = "reward-guided"


@dataclass(frozen=True)
class Step:
    """A line behind a right beginning.

    Attributes:
        text: Prompt, the right lines before it, and the line with its line end.
        right: Whether the line is right.
        source: ``"greedy"``, ``"drawn"`` or ``"corrupted"``.
    """

    text: str
    right: bool
    source: str


@dataclass(frozen=True)
class RewardRecipe:
    """How a reward is fitted.

    Attributes:
        problems: Problems of the training part.
        corrupt_share: Corrupted lines for each line that the model writes greedily.
        hidden: Hidden units of the head; 0 is a linear one.
        addends: Fewest and most numbers of a problem.
        seed: Of all draws.
    """

    problems: int = 700
    corrupt_share: float = 0.15
    hidden: int = 32
    addends: tuple[int, int] = (2, 3)
    seed: int = 0


@torch.no_grad()
def steps(model: Any, recipe: RewardRecipe) -> list[Step]:
    """Steps of a model and corrupted ones, labelled.

    Args:
        model: A target of the ``sums`` task.
        recipe: How many, and of what problems.
    """
    asked = sums.problems(
        recipe.problems, "train", seed=f"reward/{recipe.seed}", addends=recipe.addends
    )
    rng = random.Random(recipe.seed)
    begun: list[tuple[sums.Problem, int, str]] = []  # problem, lines so far, text so far
    found: list[Step] = []
    for problem in asked:
        text = problem.prompt
        for index, line in enumerate(sums.lines(problem.solution())):
            begun.append((problem, index, text))
            if rng.random() < recipe.corrupt_share:
                wrong = sums.corrupt(line, rng)
                found.append(Step(f"{text}{wrong}\n", False, "corrupted"))
            text += f"{line}\n"
    for source, temperature in (("greedy", 0.0), ("drawn", 1.0)):
        lines = _next_lines(model, [text for _, _, text in begun], temperature, recipe.seed)
        for (problem, index, text), line in zip(begun, lines, strict=True):
            right = sums.check_step(problem, index, line)
            found.append(Step(f"{text}{line}\n", right, source))
    return found


def _next_lines(
    model: Any, texts: list[str], temperature: float, seed: int, limit: int = 24
) -> list[str]:
    tokenizer = sums.tokenizer()
    newline, end = tokenizer.encode("\n")[0], int(tokenizer.eos_token_id)
    lines: list[str] = []
    for first in range(0, len(texts), 256):
        prompts = [torch.tensor(tokenizer.encode(t)) for t in texts[first : first + 256]]
        relay = Relay([model], prompts)
        draws = [torch.Generator().manual_seed(seed + first + b) for b in range(len(prompts))]
        limits = [len(p) + limit for p in prompts]
        rows = range(len(prompts))
        relay.write(0, rows, lambda line: line[-1] in (newline, end), limits, temperature, draws)
        for text, prompt in zip(relay.texts, prompts, strict=True):
            written = str(tokenizer.decode(text[len(prompt) :]))
            lines.append(written.replace(sums.END, "").rstrip("\n"))
    return lines


@torch.no_grad()
def states_of(model: Any, texts: list[str]) -> torch.Tensor:
    """Last hidden states of a model at the ends of texts, [M, D]."""
    tokenizer = sums.tokenizer()
    end = f"{sums.ANSWER}"
    out = []
    for first in range(0, len(texts), 256):
        prompts = []
        for text in texts[first : first + 256]:
            ids = tokenizer.encode(text)
            if text[:-1].rsplit("\n", 1)[-1].startswith(end):  # an answer ends the text
                ids[-1] = int(tokenizer.eos_token_id)
            prompts.append(torch.tensor(ids))
        relay = Relay([model], prompts, watched=(0,))
        out.append(relay.states(0, range(len(prompts))))
    return torch.cat(out)


def sums_reward(model: Any, recipe: RewardRecipe | None = None) -> StateHead:
    """A head that scores lines from a model's own states, fitted now if it was not before.

    Args:
        model: The target of the ``sums`` task whose states it reads.
        recipe: How it is fitted.
    """
    recipe = recipe or RewardRecipe()
    key = [asdict(recipe), target_fingerprint(model), sums.digest()]
    with kept("rewards", SYSTEM, key) as folder:
        try:
            return StateHead.from_pretrained(folder, SYSTEM, model)
        except (BrokenFileError, MismatchError):
            pass  # not there yet, or damaged: fit it
        drawn = steps(model, recipe)
        states = states_of(model, [step.text for step in drawn])
        labels = torch.tensor([step.right for step in drawn])
        head = StateHead(states.shape[1], recipe.hidden, seed=recipe.seed)
        loss = head.fit(states, labels)
        head.record = {
            "recipe": asdict(recipe),
            "steps": len(drawn),
            "right": round(float(labels.float().mean()), 4),
            "loss": round(loss, 4),
        }
        head.save_pretrained(folder, SYSTEM, model)
    return head
