"""Fusion of models with different vocabularies, against enumeration and by hand."""

from itertools import product

import pytest
import torch
from test_bytevocab import byte_level
from transformers import LlamaConfig, LlamaForCausalLM

from isthmus.decoding.byte_fusion import (
    ByteMember,
    Leader,
    NextByte,
    lead_and_score,
    rescored,
    softened,
)
from isthmus.decoding.bytescorer import ByteScorer
from isthmus.decoding.bytevocab import ByteVocab
from isthmus.decoding.model import Model
from isthmus.decoding.prefixes import PrefixScorer
from isthmus.decoding.table import ListTarget, TableTarget
from isthmus.errors import InvalidInputError
from isthmus.folders import EMBEDDED
from isthmus.models.hub import load_checkpoint
from isthmus.workbench import chains

WORDS = {b"catnip": 0.6, b"carpet": 0.3, b"cab": 0.1}


def listed(vocab: ByteVocab, texts: dict[bytes, float]) -> ByteScorer:
    """The exact model of a few texts."""
    end = vocab.size
    table = {(*vocab.encode(t), end): p for t, p in texts.items()}
    return ByteScorer(ListTarget(table, end + 1, [end]), vocab, [end], [end], tolerance=0.0)


def chain(cut: chains.Cut) -> ByteScorer:
    target = chains.exact_model(cut, 6)
    return ByteScorer(target, chains.vocab(cut), [chains.END], [chains.END], tolerance=0.0)


def words() -> ByteScorer:
    pieces = [b"ca", b"nip", b"pet", b"cat", *(bytes([c]) for c in b"abceinprt")]
    return listed(ByteVocab.of(pieces), WORDS)


def letters() -> ByteVocab:
    return ByteVocab.of([bytes([c]) for c in b"abceinprt"])


@pytest.mark.parametrize("how", ["product", "mixture"])
def test_vocabularies_do_not_matter(how: str) -> None:
    """Two exact models of one chain with different tokens are one model, and so is their fusion."""
    fused = NextByte([ByteMember(chain("longest"), 0.3), ByteMember(chain("merges"), 0.7)], how)  # type: ignore[arg-type]
    for text in ("".join(t) for n in range(6) for t in product("AB", repeat=n)):
        law = fused.law(text.encode()).exp()
        assert abs(float(law[ord("A")]) - chains.after(text)) < 1e-9
        assert abs(float(law.sum()) - 1) < 1e-9


def test_products_and_mixtures_by_hand() -> None:
    one = listed(ByteVocab.of([b"a", b"b", b"ab"]), {b"ab": 0.5, b"b": 0.5})
    two = listed(ByteVocab.of([b"b", b"a"]), {b"ab": 0.2, b"b": 0.8})
    both = [ByteMember(one), ByteMember(two)]
    mixed = NextByte(both, "mixture").law(b"").exp()
    assert float(mixed[ord("a")]) == pytest.approx(0.35)
    multiplied = NextByte(both).law(b"").exp()
    assert float(multiplied[ord("a")]) == pytest.approx(0.1 / 0.5)
    contrast = NextByte([ByteMember(one), ByteMember(two, -1.0)]).law(b"").exp()
    assert float(contrast[ord("a")]) == pytest.approx(2.5 / (2.5 + 0.625))
    alone = NextByte([ByteMember(one), ByteMember(two, 0.0)]).law(b"").exp()
    assert float(alone[ord("a")]) == pytest.approx(0.5)


def test_bytes_are_generated_until_the_end() -> None:
    fused = NextByte([ByteMember(words()), ByteMember(listed(letters(), WORDS))])
    assert fused.generate(b"ca", 10) == b"tnip"
    assert fused.generate(b"ca", 2) == b"tn"
    assert fused.generate(b"c", 10, torch.Generator().manual_seed(0)) in {w[1:] for w in WORDS}


def test_loaded_models_with_unlike_tokenizers_are_one() -> None:
    loaded = load_checkpoint(str(EMBEDDED / "pycode-t"))
    code = Model(loaded.model, loaded.tokenizer)
    tokenizer = byte_level()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), intermediate_size=32, eos_token_id=0, **sizes)
    other = Model(LlamaForCausalLM(config).eval(), tokenizer)
    prompt = b"import os\n\ndef path(name):\n    ret"
    both = NextByte.of([code, other])
    assert both.generate(prompt, 4) == b"urn "  # the prompt ends inside a token of one of them
    law = both.law(prompt).exp()
    assert abs(float(law.sum()) - 1) < 1e-9
    alone, own = NextByte.of([code, other], [1, 0]), ByteScorer.of(code)
    assert torch.allclose(alone.law(prompt), own.next_byte(prompt).double(), atol=1e-5)
    with pytest.raises(InvalidInputError, match="2 models and 1 weights"):
        NextByte.of([code, other], [1.0])


def recogniser(seen: dict[bytes, float]) -> Leader:
    scorer = listed(letters(), seen)
    return Leader(PrefixScorer(scorer.prefixes.target, [9]), scorer.vocab, [9])


def test_the_follower_turns_what_the_leader_hears() -> None:
    heard = {b"catnip": 0.30, b"carpet": 0.25, b"cabpit": 0.45}
    alone = lead_and_score(recogniser(heard), [ByteMember(words())], rate=0.0)
    assert [h.trace["bytes"] for h in alone] == [b"cabpit", b"catnip", b"carpet"]
    assert alone[0].logprob == pytest.approx(torch.tensor(0.45).log().item())
    follower = words()
    fused = lead_and_score(recogniser(heard), [ByteMember(follower)], rate=0.5)
    assert fused[0].trace["bytes"] == b"catnip"
    # by hand: the leader per letter and the end, the follower per token of its own: [cat][nip]
    logs = torch.tensor([0.30, 0.6]).log().tolist()
    assert fused[0].score == pytest.approx(0.5 * logs[0] / 7 + 0.5 * logs[1] / 2, abs=1e-5)
    ranked = rescored(alone, [ByteMember(follower)], 0.5)
    assert ranked[0].trace["bytes"] == b"catnip"


def test_without_followers_it_is_the_leaders_own_beam() -> None:
    """The best of all answers, when the beam is wide enough to hold them."""
    target = TableTarget(3, seed=4, sharpness=1.5)
    leader = Leader(PrefixScorer(target, [0]), ByteVocab.of([b"a", b"b", None]), [2])
    law = PrefixScorer(target, [0])
    best = lead_and_score(leader, [], rate=0.0, width=64, max_new_tokens=4)
    assert all(best[i].score >= best[i + 1].score for i in range(len(best) - 1))
    for h in best[:4]:
        sums, laws = law.score([list(h.tokens)])
        assert h.logprob in (
            pytest.approx(sums[0] + float(laws[0, 2])),
            pytest.approx(sums[0]),
        )


def test_softened_logits_by_hand() -> None:
    reshape = softened(2.0, 2.0, window=2)
    assert reshape is not None
    logits = torch.tensor([[4.0, -4.0, 4.0]])
    assert reshape([[2, 0, 1]], logits).tolist() == [[1.0, -4.0, 2.0]]
    assert logits.tolist() == [[4.0, -4.0, 4.0]]
    assert softened(1.0) is None


def test_refusals() -> None:
    with pytest.raises(InvalidInputError, match="at least one member"):
        NextByte([ByteMember(words(), 0.0)])
    with pytest.raises(InvalidInputError, match="negative"):
        NextByte([ByteMember(words(), -1.0)], "mixture")
    with pytest.raises(InvalidInputError, match="product or mixture"):
        NextByte([ByteMember(words())], "sum")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="0 to 1"):
        lead_and_score(recogniser({b"cab": 1.0}), [], rate=2.0)
