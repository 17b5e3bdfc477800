"""A companion's logits at every node are those of a fresh forward on the text so far."""

import pytest
import tiny
import torch

from isthmus.decoding.acceptance import Lossless
from isthmus.decoding.beam import BeamSearch
from isthmus.decoding.companion import Accompanied, Companion
from isthmus.decoding.engine import Request, decode
from isthmus.decoding.law import Law
from isthmus.decoding.search import search
from isthmus.decoding.stopping import Stopper
from isthmus.decoding.target import HubTarget
from isthmus.decoding.tree import TokenTree
from isthmus.errors import MismatchError
from isthmus.roles import Context, Forkable, Reshape

OTHER = tiny.target("Llama", noise=0.5)


class Checked(Accompanied):
    """Adds the companion's logits and compares them with a fresh forward at every node."""

    def __init__(self, *companions, prompt=None):
        super().__init__(*companions)
        self.prompt, self.nodes, self.source = prompt, 0, None

    def begin(self, context, target, **inputs):
        super().begin(context, target, **inputs)
        self.source = inputs or self.source

    def combine(self, logits, others):
        return logits + others[0]

    def __call__(self, logits, tree, context):
        (companion,) = self.companions
        got = companion.logits(tree, context)
        assert companion.logits(tree, context) is not None
        for b in range(context.batch):
            before = context.ids[b, : context.lengths[b]]
            if self.prompt is not None:
                n = context.prompt_lengths[b]
                before = torch.cat([self.prompt(context.requests[b], before[:n]), before[n:]])
            for node in range(tree.nodes):
                if not tree.alive[b, node]:
                    continue
                seen = tree.topology.ancestors.expand(tree.batch, -1, -1)[b, node]
                path = tree.tokens[b][seen][1:]
                encoded = None
                if self.source:
                    row = {k: v[context.requests[b] % len(v)][None] for k, v in self.source.items()}
                    encoded = companion.model.encode(**row)
                ids = torch.cat([before, path])
                want = companion.model.forward(ids[None], encoded=encoded).logits[0, -1]
                torch.testing.assert_close(got[b, node], want, atol=1e-9, rtol=1e-9)
                self.nodes += 1
        return self.combine(logits, [got])


@pytest.mark.parametrize("drafter", ["none", "prompt-lookup", "token-recycling"])
def test_in_step_through_drafts_and_leaving_rows(drafter):
    part = Checked(Companion(OTHER))
    assert isinstance(part, Reshape) and isinstance(part, Forkable)
    law = Law(reshapes=[part])
    model = tiny.facade("Llama")
    prompts = [[5, 6, 7, 5, 6, 7, 5], [3, 4], [9]]
    got = model.generate(prompts, max_new_tokens=12, drafter=drafter, law=law)
    assert part.nodes > 20
    if drafter != "none":
        plain = model.generate(prompts, max_new_tokens=12, drafter="none", law=law)
        assert [r.tokens for r in got] == [r.tokens for r in plain]


def test_in_step_with_newcomers():
    part = Checked(Companion(OTHER))
    model = tiny.facade("Llama")
    prompts = [[5, 6, 7, 5, 6], [3, 4], [9, 8, 9, 8], [7], [11, 12, 13]]
    requests = [
        Request(torch.tensor(p), Stopper(max_new_tokens=4 + 3 * i)) for i, p in enumerate(prompts)
    ]
    law = Law(reshapes=[part])
    for _ in decode(
        model.target,
        requests,
        policy=model.policy("prompt-lookup"),
        acceptance=Lossless(),
        law=law,
        generator=torch.Generator(),
        batch_size=2,
    ):
        pass
    assert [len(r.result.tokens) for r in requests] == [4, 7, 10, 13, 16]
    alone = model.generate(
        prompts[4], max_new_tokens=16, law=Law(reshapes=[Checked(Companion(OTHER))])
    )
    assert alone.tokens == requests[4].result.tokens


def test_in_step_with_beams_and_sources():
    name = "Bart"
    part = Checked(Companion(tiny.target(name, noise=0.4)))
    starts, inputs = tiny.facade(name)._sources([torch.tensor([5, 6, 7, 8])], None)
    (answers,) = search(
        tiny.target(name),
        starts,
        BeamSearch(4),
        max_new_tokens=6,
        law=Law(reshapes=[part]),
        inputs=inputs,
    )
    assert len(answers) == 4 and part.nodes > 10
    part = Checked(Companion(OTHER))
    law = Law(reshapes=[part])
    search(tiny.target("Llama"), tiny.prompts(), BeamSearch(3), max_new_tokens=6, law=law)
    assert part.nodes > 30


def test_its_own_prompt():
    def prompt(request, ids):
        return torch.tensor([7 + request, 20, 21])

    part = Checked(Companion(OTHER, prompt=prompt), prompt=prompt)
    tiny.facade("Llama").generate(
        [[5, 6, 7, 5, 6, 7, 5], [3, 4]],
        max_new_tokens=8,
        drafter="prompt-lookup",
        law=Law(reshapes=[part]),
    )
    assert part.nodes > 10


def test_a_draft_model_does_not_disturb_it():
    part = Checked(Companion(OTHER))
    model = tiny.facade("Llama")
    got = model.generate(
        [[5, 6, 7, 5], [3, 4]],
        max_new_tokens=10,
        drafter="speculative-sampling",
        law=Law(reshapes=[part]),
    )
    want = model.generate(
        [[5, 6, 7, 5], [3, 4]], max_new_tokens=10, drafter="none", law=Law(reshapes=[part])
    )
    assert [r.tokens for r in got] == [r.tokens for r in want]


def test_misfits_are_refused():
    model = tiny.facade("Llama")
    short = tiny.fresh("Llama")
    short.config.max_position_embeddings = 16
    law = Law(reshapes=[Checked(Companion(HubTarget(short)))])
    with pytest.raises(MismatchError, match="16 tokens"):
        model.generate([3, 4], max_new_tokens=20, drafter="none", law=law)
    companion = Companion(OTHER)
    companion.model = type("Wide", (), {"vocab_size": 5000})()
    with pytest.raises(MismatchError, match="5000"):
        model.generate([3], max_new_tokens=2, law=Law(reshapes=[Checked(companion)]))
    with pytest.raises(MismatchError, match="begin"):
        context = Context(torch.ones(1, 4).long(), [1], [1], law, torch.Generator(), [0])
        Companion(OTHER).score(TokenTree.root(torch.tensor([1])), context)


def test_padding_rows_of_the_vocabulary_have_no_probability():
    companion = Companion(OTHER)
    wide = type("Wide", (), {"vocab_size": tiny.V + 3})()
    context = Context(torch.ones(1, 4).long(), [2], [2], None, torch.Generator(), [0])
    companion.begin(context, wide)
    logits = companion.logits(TokenTree.root(torch.tensor([1])), context)
    assert logits.shape[-1] == tiny.V + 3 and bool(logits[..., tiny.V :].isinf().all())
