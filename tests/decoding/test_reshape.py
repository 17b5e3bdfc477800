import pytest
import tiny
import torch

from isthmus.decoding.law import Law
from isthmus.decoding.reshape import Walk
from isthmus.decoding.tree import TokenTree, Topology
from isthmus.errors import InvalidInputError
from isthmus.roles import Context, Reshape


class Alternate(Walk[int]):
    """Bans tokens of the parity of the sum of all tokens before."""

    stage = "mask"

    def start(self, prompt):
        return int(prompt.sum()) % 2

    def advance(self, state, token):
        return (state + token) % 2

    def apply(self, states, logits):
        parity = torch.arange(logits.shape[-1]) % 2
        return logits.masked_fill(parity == torch.tensor(states)[:, None], -torch.inf)


def test_every_node_has_the_state_of_its_own_path():
    law = Law(reshapes=[Alternate()])
    assert isinstance(law.reshapes[0], Reshape)
    ids = torch.tensor([[1, 2, 5, 0], [1, 1, 0, 0]])
    context = Context(ids, [2, 1], [2, 1], law, torch.Generator(), [7, 3])
    law.begin(context, None)
    context.lengths = [3, 2]  # one token committed in each row since
    tree = TokenTree(torch.tensor([[5, 2, 3, 4], [1, 1, 1, 1]]), Topology.of([-1, 0, 0, 2]))
    got = law.logits(torch.zeros(2, 4, 6), tree, context)
    want = [[8, 10, 11, 15], [2, 3, 3, 4]]  # sums of the tokens along each path
    for b in range(2):
        for node in range(4):
            banned = got[b, node].isinf().nonzero().flatten() % 2
            assert set(banned.tolist()) == {want[b][node] % 2}


@pytest.mark.parametrize("drafter", ["prompt-lookup", "token-recycling"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_do_not_change_the_reshaped_text(drafter, temperature):
    model = tiny.facade("Llama")
    prompts = [[5, 6, 7, 5, 6, 7, 5], [3, 4]]

    def tokens(drafter):
        law = Law(temperature=temperature, reshapes=[Alternate()])
        out = model.generate(prompts, max_new_tokens=24, drafter=drafter, law=law, seed=1)
        return [r.tokens for r in out]

    got = tokens(drafter)
    if temperature == 0:
        assert got == tokens("none")
    for prompt, new in zip(prompts, got, strict=True):
        total = sum(prompt)
        for token in new:
            assert token % 2 != total % 2
            total += token


def test_a_law_with_reshapes_needs_a_tree():
    with pytest.raises(InvalidInputError, match="own loop"):
        Law(reshapes=[Alternate()]).row(torch.zeros(1, 4), torch.zeros(1, 1))
