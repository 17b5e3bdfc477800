"""Drafts in other words, and which of their tokens are faults: data for judging drafts.

The plain model ``sums-s`` is trained on a little with free wording behind the plain prompt, so
that it drafts solutions which are right and not what ``sums-l`` would say. :func:`first_fault` is
the annotator: it knows the first token after which a solution cannot be right any more.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from isthmus.decoding.relay import Relay
from isthmus.decoding.state_head import StateHead
from isthmus.decoding.target import HubTarget
from isthmus.decoding.trained import target_fingerprint
from isthmus.errors import BrokenFileError, MismatchError
from isthmus.folders import kept
from isthmus.roles import Taps
from isthmus.training.drafting import Recipe
from isthmus.training.tuning import IGNORED, label_loss, logits_of, tune
from isthmus.workbench import sums

SYSTEM = "judge"

WIDTH = 88
"""Tokens of a training text at most."""


@dataclass(frozen=True)
class Annotated:
    """Tokens of drafted solutions, up to the first fault of each, with labels.

    Attributes:
        states: The target's last hidden states at them [M, D].
        good: False at the faults [M].
    """

    states: torch.Tensor
    good: torch.Tensor


def first_fault(problem: sums.Problem, solution: Sequence[int]) -> int:
    """Place of the first token after which no wording makes a solution right.

    Args:
        problem: The problem.
        solution: Token ids behind its prompt.

    Returns:
        A place in ``solution``, or its length where all of it can still become right.

    Example:
        >>> ids = sums.tokenizer().encode("ones: 8 and 7 makes 16")
        >>> first_fault(sums.Problem((27, 58)), ids)  # ``6`` of ``16``
        6
    """
    words = _words()
    choices = _choices(problem)
    allowed = next(choices)
    for place, token in enumerate(solution):
        if words[token] not in allowed:
            return place
        try:
            allowed = choices.send(words[token])
        except StopIteration:
            return place + 1
    return len(solution)


@functools.lru_cache(maxsize=1)
def _words() -> list[str]:
    tokenizer = sums.tokenizer()
    return [str(tokenizer.decode([token])) for token in range(len(tokenizer))]


def _choices(problem: sums.Problem) -> Generator[set[str], str, None]:
    """The words that may come next in a right solution; is sent the one that came."""
    for kind, numbers, result in problem.meanings():
        if kind in sums.COLUMNS:
            left = [str(n) for n in numbers]
            yield {f"{kind}: "}
            while left:
                left.remove((yield set(left)))
                yield set(sums.PLUS if left else sums.IS)
            fixed = [*str(result), "\n"]
        elif kind == "answer":
            fixed = [sums.ANSWER, *str(result), sums.END]
        else:
            rest = sums.tokenizer().encode(f"{' + '.join(map(str, numbers))} =\n")
            fixed = [_words()[token] for token in rest]
        for word in fixed:
            yield {word}


def draft_texts(
    model: Any, problems: Sequence[sums.Problem], *, temperature: float = 0.0, limit: int = 64
) -> list[list[int]]:
    """Solutions that a model writes alone, as token ids without the prompts."""
    tokenizer = sums.tokenizer()
    end = int(tokenizer.eos_token_id)
    prompts = [torch.tensor(tokenizer.encode(problem.prompt)) for problem in problems]
    relay = Relay([model], prompts)
    draws = [torch.Generator().manual_seed(b) for b in range(len(prompts))]
    limits = [len(p) + limit for p in prompts]
    with torch.no_grad():
        rows = range(len(prompts))
        relay.write(0, rows, lambda text: text[-1] == end, limits, temperature, draws)
    return [text[len(p) :] for text, p in zip(relay.texts, prompts, strict=True)]


def annotated(
    target: HubTarget, problems: Sequence[sums.Problem], solutions: Sequence[Sequence[int]]
) -> Annotated:
    """The target's states at the tokens of solutions, up to the first fault of each."""
    tokenizer = sums.tokenizer()
    states, good = [], []
    for first in range(0, len(problems), 128):
        part = range(first, min(first + 128, len(problems)))
        rows = [[*tokenizer.encode(problems[i].prompt), *solutions[i]] for i in part]
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        features = target.forward(ids, taps=Taps(final=True)).features
        assert features is not None and features.final is not None
        for b, i in enumerate(part):
            fault = first_fault(problems[i], solutions[i])
            begin, count = len(rows[b]) - len(solutions[i]), min(fault + 1, len(solutions[i]))
            states.append(features.final[b, begin : begin + count])
            good.append(torch.arange(count) < fault)
    return Annotated(torch.cat(states), torch.cat(good))


def settled(
    target: HubTarget, problems: Sequence[sums.Problem], solutions: Sequence[Sequence[int]]
) -> Annotated:
    """The target's states at tokens that it would not have said, labelled by what comes of them.

    No annotator is needed (AutoJudge, 2504.20039): the target goes on behind the token, and the
    token is good if the answer comes out right. Of each solution the tokens up to the first that
    is not good are kept.
    """
    tokenizer = sums.tokenizer()
    end = int(tokenizer.eos_token_id)
    states: list[torch.Tensor] = []
    begun: list[tuple[int, list[int], int]] = []  # problem, prompt and solution so far, its start
    for index, (problem, solution) in enumerate(zip(problems, solutions, strict=True)):
        prompt = tokenizer.encode(problem.prompt)
        ids = torch.tensor([*prompt, *solution])
        scores = target.forward(ids[None], taps=Taps(final=True))
        assert scores.features is not None and scores.features.final is not None
        last = min(first_fault(problem, solution) + 1, len(solution))
        said = scores.logits[0].argmax(-1)
        for place in range(len(prompt), len(prompt) + last):
            if int(said[place - 1]) != int(ids[place]):
                begun.append((index, ids[: place + 1].tolist(), len(prompt)))
                states.append(scores.features.final[0, place])
    good: list[bool] = []
    for first in range(0, len(begun), 256):
        part = begun[first : first + 256]
        relay = Relay([target], [torch.tensor(text) for _, text, _ in part])
        limits = [start + WIDTH for _, _, start in part]
        nothing = [torch.Generator() for _ in part]
        open_rows = [b for b, (_, text, _) in enumerate(part) if text[-1] != end]
        with torch.no_grad():
            relay.write(0, open_rows, lambda text: text[-1] == end, limits, 0.0, nothing)
        good += [
            sums.check_answer(problems[index], str(tokenizer.decode(text[start:])))
            for (index, _, start), text in zip(part, relay.texts, strict=True)
        ]
    kept, spoilt = [], -1
    for row, ((index, _, _), fine) in enumerate(zip(begun, good, strict=True)):
        if index != spoilt:
            kept.append(row)
            spoilt = spoilt if fine else index
    return Annotated(torch.stack(states)[kept], torch.tensor(good)[kept])


def worded_draft(draft: HubTarget, recipe: Recipe) -> HubTarget:
    """A copy of a ``sums`` model that words its solutions freely where nobody asked for it.

    Trained now if it was not before, on the training part.

    Args:
        draft: The model to copy.
        recipe: How it is trained on.
    """
    parts = [asdict(recipe), target_fingerprint(draft), sums.digest()]
    model = copy.deepcopy(draft.model)
    with kept("tuned", "worded", parts) as place:
        path = place.with_suffix(".safetensors")
        if path.exists():
            model.load_state_dict(load_file(path), strict=False)
            return HubTarget(model.eval())
        _teach(model, recipe)
        weights = {k: v.detach().contiguous() for k, v in model.named_parameters()}
        save_file(weights, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return HubTarget(model.eval())


def _teach(model: Any, recipe: Recipe) -> None:
    encode = sums.tokenizer().encode
    rng, rows = random.Random(recipe.seed), []
    for problem in sums.problems(
        recipe.steps * recipe.batch_size, "train", seed="worded", addends=(2, 3), free=True
    ):
        prompt = encode(sums.Problem(problem.addends).prompt)
        answer = [*encode(problem.solution(rng)), int(sums.tokenizer().eos_token_id)]
        labels = [IGNORED] * (len(prompt) - 1) + answer
        ids = [*prompt, *answer][:-1]
        pad = WIDTH - len(ids)
        rows.append([*ids, *[0] * pad, *labels, *[IGNORED] * pad])

    def loss(both: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        ids, labels = both[:, :WIDTH], both[:, WIDTH:]
        width = int((labels != IGNORED).sum(0).nonzero().max()) + 1
        return label_loss(logits_of(model, ids[:, :width]), labels[:, :width])

    tune(model, torch.tensor(rows), loss, recipe)


def fitted_head(
    target: HubTarget,
    draft: HubTarget,
    *,
    by: Literal["outcome", "annotator"] = "outcome",
    count: int = 500,
    addends: tuple[int, int] = (2, 2),
) -> StateHead:
    """A linear head that tells tokens that matter from harmless ones, fitted once.

    On solutions of the draft model to problems of the training part, written greedily and drawn.

    Args:
        target: The model whose states it reads.
        draft: The model whose drafts it will judge.
        by: Where the labels come from, :func:`settled` or :func:`annotated`.
        count: Problems.
        addends: Fewest and most numbers of a problem.
    """
    models = [target_fingerprint(target), target_fingerprint(draft)]
    with kept("rewards", SYSTEM, [*models, sums.digest(), by, count, addends]) as folder:
        try:
            return StateHead.from_pretrained(folder, SYSTEM, target)
        except (BrokenFileError, MismatchError):
            pass  # not there yet, or damaged: fit it
        problems = sums.problems(count, "train", seed="judge", addends=addends)
        label = settled if by == "outcome" else annotated
        found = [
            label(target, problems, draft_texts(draft, problems, temperature=t)) for t in (0.0, 1.0)
        ]
        states, good = (torch.cat([getattr(f, n) for f in found]) for n in ("states", "good"))
        head = StateHead(states.shape[1])
        loss = head.fit(states, good, balance=True)
        faults = int((~good).sum())
        head.record = {"tokens": len(good), "faults": faults, "loss": round(loss, 4)}
        head.save_pretrained(folder, SYSTEM, target)
    return head
