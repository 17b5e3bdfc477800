"""Probabilities of bytes, against the enumeration of all texts."""

import math
from collections import Counter
from itertools import product

import pytest
import tiny
import torch
from test_bytevocab import byte_level
from tokenizers import Tokenizer, models, normalizers

from isthmus.decoding.bytescorer import END, ByteScorer
from isthmus.decoding.bytevocab import ByteVocab
from isthmus.decoding.prefixes import CHUNK, PrefixScorer
from isthmus.decoding.table import ListTarget, TableTarget
from isthmus.errors import InvalidInputError, UnsupportedModelError


def texts(alphabet: str, length: int) -> dict[bytes, float]:
    """Every text of a length, with any probability at all."""
    torch.manual_seed(0)
    found = ["".join(t).encode() for t in product(alphabet, repeat=length)]
    weights = torch.rand(len(found), generator=torch.Generator().manual_seed(1)).double() ** 3
    return dict(zip(found, (weights / weights.sum()).tolist(), strict=True))


def merging() -> ByteVocab:
    """Two letters; "ba" is merged before "ab", so what follows undoes what is there."""
    pairs = [("b", "a"), ("a", "b"), ("ab", "ab"), ("ba", "ba")]
    words = ["a", "b", *("".join(pair) for pair in pairs)]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, pairs))
    return ByteVocab.of([w.encode() for w in words], lambda text: made.encode(text.decode()).ids)


def exact(vocab: ByteVocab, truth: dict[bytes, float], **options: object) -> ByteScorer:
    """The scorer of the exact model of all texts; its begin and end token is one more."""
    end = vocab.size
    cuts = vocab.encode_all(list(truth))
    table = {(*ids, end): p for ids, p in zip(cuts, truth.values(), strict=True)}
    target = ListTarget(table, vocab.size + 1, [end])
    return ByteScorer(target, vocab, [end], [end], **options)  # type: ignore[arg-type]


def begins(truth: dict[bytes, float], text: bytes) -> float:
    return sum(p for t, p in truth.items() if t.startswith(text))


@pytest.mark.parametrize(
    ("vocab", "alphabet", "length"),
    [
        (merging(), "ab", 8),
        (ByteVocab(byte_level(275)), "ab", 8),
        # GPT-2's pre-tokenizer looks ahead at what follows spaces
        (ByteVocab(byte_level(275)), "ab ", 6),
    ],
)
def test_the_sum_over_covers_is_exact(vocab: ByteVocab, alphabet: str, length: int) -> None:
    truth = texts(alphabet, length)
    scorer = exact(vocab, truth, tolerance=0.0)
    worst = 0.0
    for n in range(0, length + 1, 1 if alphabet == "ab" else 2):
        for letters in product(alphabet, repeat=n):
            text = "".join(letters).encode()
            read = scorer.read(text)
            whole = begins(truth, text)
            worst = max(worst, abs(math.exp(read.logp) - whole))
            law = read.next_byte.exp()
            assert abs(float(law.sum()) - 1) < 1e-9
            for letter in alphabet.encode():
                true = begins(truth, text + bytes([letter])) / whole
                worst = max(worst, abs(float(law[letter]) - true))
            worst = max(worst, abs(float(law[END]) - (1.0 if n == length else 0.0)))
    assert worst < 1e-12


def test_the_tokens_alone_are_biased_for_ever() -> None:
    """After "a" where "ab" is a token, "b" never comes: the tokenizer would have merged it."""
    vocab = ByteVocab.of([b"a", b"b", b"ab"])
    truth = texts("ab", 6)
    told = exact(vocab, truth, covers="tokens").next_byte(b"a").exp()
    assert float(told[ord("b")]) == 0.0
    right = exact(vocab, truth).next_byte(b"a").exp()
    assert abs(float(right[ord("b")]) - begins(truth, b"ab") / begins(truth, b"a")) < 1e-12


def test_boundaries_are_exact_for_the_longest_prefix_and_not_for_merges() -> None:
    truth = texts("ab", 7)
    longest = exact(ByteVocab.of([b"a", b"b", b"ab", b"abb"]), truth, covers="boundaries")
    merged = exact(merging(), truth, covers="boundaries")
    errors = {}
    for name, scorer in (("longest", longest), ("merged", merged)):
        errors[name] = max(
            abs(math.exp(scorer.logp(text)) - begins(truth, text))
            for n in range(1, 6)
            for text in ("".join(t).encode() for t in product("ab", repeat=n))
        )
    assert errors["longest"] < 1e-12
    assert errors["merged"] > 1e-3


def test_covers_are_drawn_by_their_probability() -> None:
    vocab, truth = merging(), texts("ab", 6)
    scorer = exact(vocab, truth, tolerance=0.0)
    text = b"abab"
    expected: Counter[tuple[int, ...]] = Counter()
    for whole, p in truth.items():
        if whole.startswith(text):
            ids, end = vocab.encode(whole), 0
            while len(vocab.decode(ids[:end])) < len(text):
                end += 1
            expected[tuple(ids[:end])] += p
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(tuple(scorer.cover(text, generator)) for _ in range(2000))
    assert set(drawn) <= set(expected)
    assert len(expected) > 1
    total = sum(expected.values())
    for cover, p in expected.items():
        assert abs(drawn[cover] / 2000 - p / total) < 0.05
    assert tuple(scorer.cover(text)) == max(expected, key=lambda c: expected[c])


def test_a_character_cut_in_two() -> None:
    """The first byte of a letter is enough to know that its second comes."""
    truth = {"ü".encode() * 2: 0.5, "üa".encode(): 0.2, "ä€".encode(): 0.3}
    scorer = exact(ByteVocab(byte_level(290)), truth, tolerance=0.0)
    first, second = "ü".encode()
    assert abs(math.exp(scorer.logp(bytes([first]))) - 1.0) < 1e-12
    law = scorer.next_byte(bytes([first])).exp()
    assert abs(float(law[second]) - 0.7) < 1e-12
    assert abs(float(scorer.next_byte("ü".encode()).exp()[ord("a")]) - 2 / 7) < 1e-12


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Bloom"])
def test_one_forward_over_a_tree_equals_one_forward_each(name: str) -> None:
    target = tiny.target(name)
    scorer = PrefixScorer(target, [1, 5])
    rows = [[3, 4, 5], [3, 4], [3, 7, 8, 9], []]
    for asked in (rows, [[3, 4, 5, 6, 7]], rows[::-1], [[9]]):
        sums, laws = scorer.score(asked)
        for row, total, law in zip(asked, sums, laws, strict=True):
            whole = torch.tensor([[1, 5, *row]])
            logits = target.model(whole).logits[0].detach().log_softmax(-1)
            own = sum(float(logits[1 + k, token]) for k, token in enumerate(row))
            assert abs(total - own) < 1e-6
            assert torch.allclose(law.double(), logits[-1].double(), atol=1e-6)


def test_long_texts_are_read_in_pieces() -> None:
    target = TableTarget(7, seed=2, order=2)
    row = torch.randint(0, 7, (2 * CHUNK + 50,), generator=torch.Generator().manual_seed(0))
    pieces = PrefixScorer(target, [0])
    (total,), _ = pieces.score([row.tolist()])
    single = PrefixScorer(target, [0])
    for end in range(0, len(row) + 1, 100):
        (partial,), law = single.score([row[:end].tolist()])
        (again,), other = pieces.score([row[:end].tolist()])
        assert abs(partial - again) < 1e-9
        assert torch.allclose(law, other)
    assert abs(single.score([row.tolist()])[0][0] - total) < 1e-9


def test_reshaped_logits_see_their_own_past() -> None:
    seen: list[list[int]] = []

    def reshape(paths: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        seen.extend(paths)
        return logits / 2

    target = TableTarget(5, seed=1)
    sums, _ = PrefixScorer(target, [0], reshape).score([[1, 2], [1, 3]])
    flat, _ = PrefixScorer(TableTarget(5, seed=1, sharpness=0.5), [0]).score([[1, 2], [1, 3]])
    assert sums == pytest.approx(flat)
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 3]]


def test_refusals() -> None:
    vocab = ByteVocab.of([b"a", b"b"])
    with pytest.raises(UnsupportedModelError):
        ByteScorer(TableTarget(3, reach="step"), vocab, [2])
    with pytest.raises(InvalidInputError, match="at least one token"):
        ByteScorer(TableTarget(3), vocab, [])
    with pytest.raises(InvalidInputError, match="covers"):
        ByteScorer(TableTarget(3), vocab, [2], covers="some")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="reads 4"):
        ByteScorer(TableTarget(3, max_length=4), vocab, [2]).logp(b"aabab")
    with pytest.raises(InvalidInputError, match="no probability"):
        exact(vocab, {b"ab": 1.0}).read(b"b")
    assert exact(vocab, {b"ab": 1.0}).logp(b"b") == -math.inf
    lower = byte_level()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InvalidInputError, match="Lowercase"):
        ByteScorer(TableTarget(300), ByteVocab(lower), [2])
