"""Gated units by hand and against torch, the phrase network, and phrase tables."""

from __future__ import annotations

import math
import random

import pytest
import torch

from isthmus.cli.main import main
from isthmus.decoding.phrase_table import PhraseTable, accuracy, best_lists, reachable, tuned
from isthmus.errors import InvalidInputError
from isthmus.models.phrase_network import PhraseNetwork
from isthmus.nn.recurrent import GatedUnit
from isthmus.systems.text.rnn_encoder_decoder import RnnEncoderDecoder, aligned
from isthmus.training.data import Data, Pair
from isthmus.workbench import numbers


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("reset_before", [True, False])
def test_one_step_by_hand(reset_before):
    unit = GatedUnit(1, 1, 1, reset_before=reset_before).double()
    w_r, w_z, w = 0.3, -0.5, 0.8
    u_r, u_z, u = 0.2, 0.4, -0.6
    c_r, c_z, c = 0.1, -0.2, 0.7
    with torch.no_grad():
        unit.from_input.weight.copy_(torch.tensor([[w_r], [w_z], [w]]))
        unit.from_state.weight.copy_(torch.tensor([[u_r], [u_z]]))
        unit.from_reset.weight.fill_(u)
        unit.from_context.weight.copy_(torch.tensor([[c_r], [c_z], [c]]))
    x, h, told = 2.0, 0.5, -1.0
    r, z = sigmoid(w_r * x + u_r * h + c_r * told), sigmoid(w_z * x + u_z * h + c_z * told)
    inner = u * (r * h) + c * told if reset_before else r * (u * h + c * told)
    expected = z * h + (1 - z) * math.tanh(w * x + inner)
    found = unit(*(torch.tensor([v], dtype=torch.float64) for v in ([[x]], [h], [told])))
    assert float(found.detach()) == pytest.approx(expected, abs=1e-6)


def test_only_the_form_after_is_that_of_torch():
    theirs = torch.nn.GRU(3, 4, bias=False, batch_first=True)
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    for reset_before in (False, True):
        unit = GatedUnit(3, 4, reset_before=reset_before)
        with torch.no_grad():
            unit.from_input.weight.copy_(theirs.weight_ih_l0)
            unit.from_state.weight.copy_(theirs.weight_hh_l0[:8])
            unit.from_reset.weight.copy_(theirs.weight_hh_l0[8:])
        assert torch.allclose(unit(x), theirs(x)[0], atol=1e-6) != reset_before


def test_padding_leaves_the_state_and_summaries_have_one_length():
    torch.manual_seed(0)
    network = PhraseNetwork(20, 8, 4, 4)
    short = torch.tensor([[5, 6, 1]])
    padded = torch.tensor([[5, 6, 1, 0, 0, 0, 0]])
    torch.testing.assert_close(network.encode(short), network.encode(padded))
    assert network.encode(short).shape == network.encode(torch.arange(1, 15)[None]).shape
    target = torch.tensor([[7, 8, 1]])
    whole = network(short, target)
    summary, state, steps = network.encode(short), None, []
    for token in ([[0]], [[7]], [[8]]):
        logits, state = network.step(summary, torch.tensor(token), state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    off = PhraseNetwork(20, 8, 4, 4, told=False)
    assert torch.equal(off(short, target), off(torch.tensor([[9, 9, 9]]), target))


def test_scores_are_log_probabilities_of_whole_targets():
    system = RnnEncoderDecoder.untrained(
        RnnEncoderDecoder.scales["test"].settings, Data(numbers.pairs(50), numbers.pairs(5))
    )
    pair = Pair("four", "12")
    ids = system.tokenizer("12").input_ids
    source = torch.tensor([system.tokenizer("four").input_ids])
    logp = torch.log_softmax(system.module(source, torch.tensor([ids])), -1)[0]
    expected = float(sum(logp[i, t] for i, t in enumerate(ids)).detach())
    others = [Pair("a much longer source than that", "123456")]
    assert system.score([pair, *others])[0] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InvalidInputError, match="needs two sides"):
        system.score([Pair("four", " ")])


def test_a_phrase_table_counts_and_a_feature_decides_a_tie():
    table = PhraseTable.count([Pair("vier", "4"), Pair("vier", "9"), Pair("neun", "9")])
    assert table.features("vier", "9") == (math.log(0.5), math.log(0.5))
    assert table.features("neun", "9") == (0.0, math.log(0.5))
    scores = {Pair("vier", "4"): -0.1, Pair("vier", "9"): -5.0, Pair("neun", "9"): -0.1}
    lists = best_lists(table, [["vier", "neun"]], scores)
    assert [h[0] for h in lists[0]] == [("4", "9"), ("9", "9")]
    assert lists[0][0][1] == pytest.approx((math.log(0.5), math.log(0.5), -0.2))
    assert accuracy(lists, [("9", "9")], (1.0, 0.0, 0.0)) == 0.0  # a tie goes to the first
    weights = tuned(lists, [("4", "9")], network=True)
    assert accuracy(lists, [("4", "9")], weights) == 1.0
    assert reachable(lists, [("4", "9")]) == 1.0 and reachable(lists, [("4", "4")]) == 0.0
    assert tuned(lists, [("4", "9")], network=False)[2] == 0.0


def test_errors_of_alignment_stay_inside_a_sentence():
    kinds = [Pair(f"s{n}", f"t{n}") for n in range(50)]
    found = aligned(kinds, 2_000, random.Random(0))
    crossed = 0
    for a, b in zip(found[::2], found[1::2], strict=True):
        assert {a.source[1:], b.source[1:]} == {a.target[1:], b.target[1:]}
        crossed += a.source[1:] != a.target[1:]
    assert 0.16 < crossed / 2_000 < 0.23


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, ("zero", "null", "nul", "noll")),
        (101, ("one hundred one", "einhunderteins", "honderdeen", "etthundraett")),
        (1022, ("one thousand twenty-two", "eintausendzweiundzwanzig", "duizend tweeëntwintig",
                "ettusentjugotvå")),
        (9999, ("nine thousand nine hundred ninety-nine",
                "neuntausendneunhundertneunundneunzig",
                "negenduizend negenhonderdnegenennegentig",
                "niotusenniohundranittionio")),
    ],
)  # fmt: skip
def test_numbers_are_spelt(number, words):
    assert tuple(numbers.spell(number, code) for code in numbers.LANGUAGES) == words


def test_it_is_trained_and_run_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "p.tsv").write_text("\n".join(f"{n} plus\t{n}" for n in range(40)))
    words = ["train", "rnn-encoder-decoder", "-o", str(out), "--data", str(tmp_path / "p.tsv")]
    assert main([*words, "--scale", "test", "--steps", "2"]) == 0
    capsys.readouterr()
    assert main(["run", str(out), "3 plus\t3"]) == 0
    assert float(capsys.readouterr().out) < 0
    assert main(["run", str(out), "3 plus"]) == 0
    assert main(["run", str(out), " "]) == 2
    assert "the phrase is empty" in capsys.readouterr().err
