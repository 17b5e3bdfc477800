import itertools
import random

import pytest
import torch

from isthmus.claims import Ruler
from isthmus.decoding.planning import Node, Planner, p_ucb
from isthmus.decoding.table import TableTarget
from isthmus.decoding.tree import TokenTree
from isthmus.errors import InvalidInputError
from isthmus.signals.sandbox import run_python
from isthmus.systems.decoding.pg_td import PgTd, Settings, claim
from isthmus.workbench import lists

END, PROMPT = 0, torch.tensor([3, 1])


def target(sharpness=2.0):
    return TableTarget(5, seed=2, sharpness=sharpness, order=2)


def needle(wanted):
    """Reward of a hidden answer: the share of leading tokens that are right."""

    def reward(tokens):
        padded = [*tokens, *[-1] * len(wanted)]
        same = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(padded, wanted, strict=False)
        )
        return len(list(same)) / len(wanted)

    return reward


def search(wanted, **settings):
    return PgTd(target(), needle(wanted), END, Settings(**settings))


@pytest.mark.parametrize("wanted", [(4, 4, 4), (1, 3, 2), (2, 2, 1)])
def test_with_all_tokens_the_best_answer_is_found(wanted):
    settings = Settings(top_k=5, rollouts=2000)
    found = PgTd(target(0.5), needle(wanted), END, settings)
    out = found.generate(PROMPT, max_new_tokens=3)
    assert out.tokens == list(wanted)


def test_switched_off_it_is_greedy_decoding():
    out = search((4, 4, 4), plan=False).generate(PROMPT, max_new_tokens=6)
    ids, law = PROMPT.tolist(), target()
    greedy = []
    for _ in range(6):
        session = law.session(1)
        session.prefill([torch.tensor(ids[:-1])])
        token = int(session.score(TokenTree.root(torch.tensor(ids[-1:]))).logits[0, 0].argmax())
        greedy.append(token)
        ids.append(token)
        if token == END:
            break
    assert out.tokens == greedy


@pytest.mark.parametrize("rollouts", [3, 10, 40])
def test_caches_save_forwards_and_change_nothing(rollouts):
    with_cache, without = (
        search((1, 3, 2), rollouts=rollouts, cache=cache).generate(PROMPT, max_new_tokens=5)
        for cache in (True, False)
    )
    assert with_cache.tokens == without.tokens and with_cache.notes == without.notes
    assert with_cache.stats.target_forwards < without.stats.target_forwards


def test_the_reward_never_falls_with_more_roll_outs():
    best = [
        needle((4, 2, 3))(search((4, 2, 3), top_k=5, rollouts=n).generate(PROMPT).tokens)
        for n in (1, 5, 25, 125)
    ]
    assert best == sorted(best) and best[-1] > best[0]


def test_p_ucb_by_hand():
    parent = Node((), visits=5)
    kid = Node((1,), prior=0.2, visits=4, value=0.5)
    # ln(16 / 10) + 4 = 4.470004; sqrt(ln 5) = 1.268636; 1 + n = 4
    assert p_ucb(parent, kid, 10, 4) == pytest.approx(0.5 + 4.470004 * 0.2 * 1.268636 / 4)


def test_the_maximum_is_backed_up_and_the_mean_where_asked():
    rewards = {(): 0.0, (1,): 1.0, (2,): 0.5}
    for maximum, want in ((True, 1.0), (False, 2 / 3)):
        planner = Planner(
            lambda p: [] if p else [(1, 0.6), (2, 0.4)], rewards.__getitem__, maximum=maximum
        )
        assert [planner.simulate() for _ in range(3)] == [0.0, 1.0, 1.0]
        assert planner.root.value == want and planner.root.visits == 4


def test_bad_settings_are_refused():
    with pytest.raises(InvalidInputError, match="at least 1"):
        search((1,), rollouts=0)


def test_problems_are_solved_by_their_programs_and_parts_do_not_meet():
    rng = random.Random(0)
    parts = {
        split: [lists.problem(split, rng) for _ in range(200)] for split in ("train", "held-out")
    }
    for one in itertools.chain(*parts.values()):
        assert lists.passes(one.answer, one.public) == lists.passes(one.answer, one.hidden) == 1
        assert lists.tokenizer().unk_token_id not in lists.tokenizer().encode(one.prompt)
        assert len(lists.tokenizer().encode(one.prompt)) + lists.LONGEST + 1 <= 64
    programs = [{one.program for one in part} for part in parts.values()]
    assert not programs[0] & programs[1]


@pytest.mark.parametrize("text", ["", "sort sort sort sort sort sort", "sort 3", "nonsense"])
def test_what_is_no_program_passes_nothing(text):
    assert lists.passes(text, (([1, 2], [1, 2]),)) == 0


def test_the_sandbox_ends_what_does_not_end():
    assert run_python("while True: pass", cpu_s=1).reason == "timeout"
    assert run_python("import time; time.sleep(60)", wall_s=1).reason == "timeout"
    assert run_python("print('a' * 10**5)", output=100).reason == "output"
    assert "MemoryError" in run_python("x = bytearray(10**10)").reason
    assert run_python("1 / 0").reason == "ZeroDivisionError: division by zero"
    assert run_python("import os; print(dict(os.environ), os.listdir())").output.endswith("[]\n")
    network = run_python("import socket; socket.create_connection(('127.0.0.1', 9), 1)")
    assert not network.ok
    with pytest.raises(InvalidInputError, match="positive"):
        run_python("", cpu_s=0)


def test_the_claim_made_small():
    found = claim(Ruler(), "test")
    gates = {gate.name: gate for gate in found.gates}
    assert gates["same programs solved without the caches"].passed
    assert gates["forwards saved by the caches"].value > 1
