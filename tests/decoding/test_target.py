"""Targets: every route of tokens into the cache gives the logits of the plain model."""

from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch

from isthmus.decoding import cache as cache_module
from isthmus.decoding.drafters import PromptLookup
from isthmus.decoding.policy import Fixed
from isthmus.decoding.table import TableSession, TableTarget
from isthmus.decoding.target import HubTarget, SlotSession, probe_error
from isthmus.decoding.tree import TokenTree, Topology, chain_topology
from isthmus.errors import InvalidInputError, UnsupportedModelError
from isthmus.roles import Context, Scores, Shape, Taps
from isthmus.testing import check_target

ATTENTION = [n for n in tiny.NAMES if tiny.REACH[n] == "tree"]


def inputs_for(name: str, rows: int = 3) -> dict[str, torch.Tensor]:
    """Ragged encoder inputs where the architecture has an encoder."""
    if not tiny.target(name).encoder_decoder:
        return {}
    if name == "Whisper":
        return {"input_features": tiny.features(name, "float64", rows)}
    ids = torch.stack(
        [torch.nn.functional.pad(p, (0, 13 - len(p))) for p in tiny.prompts((9, 13, 6))]
    )
    mask = torch.arange(13) < torch.tensor([[9], [13], [6]])
    return {"input_ids": ids[:rows], "attention_mask": mask[:rows].long()}


@pytest.mark.parametrize("name", tiny.NAMES)
def test_contract(name: str) -> None:
    given = inputs_for(name) or None
    # these compute parts of their layers in float32 whatever their dtype
    single = name in ("Bloom", "Mamba", "Mamba2")
    check_target(tiny.target(name), inputs=given, rounds=2, tolerance=1e-5 if single else 1e-12)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["Llama", "Gemma3", "T5", "Bart"])
def test_contract_by_kernel(name: str, kernel: str) -> None:
    model = tiny.fresh(name)
    model.set_attn_implementation(kernel)
    target = HubTarget(model)
    assert target.reach == "tree"
    limit = 1e-5 if kernel == "eager" else 1e-12  # eager kernels take the softmax in float32
    check_target(target, inputs=inputs_for(name) or None, rounds=2, tolerance=limit)


@pytest.mark.parametrize("name", ATTENTION)
def test_ragged_keep_and_compaction_against_no_cache(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve random rounds, compared with the plain model that never saw a cache or a tree."""
    monkeypatch.setattr(cache_module, "SLACK", 2)
    target = tiny.target(name)
    generator = torch.Generator().manual_seed(11)
    given = inputs_for(name)
    encoded = target.encode(**given) if given else None
    state = tiny.prompts((5, 11, 2), seed=4)
    session = target.session(3, **given)
    session.prefill(state)
    worst, sizes = 0.0, []
    for _ in range(12):
        parents = [
            [-1, *(int(torch.randint(0, i, (1,), generator=generator)) for i in range(1, 7))]
            for _ in range(3)
        ]
        topology = Topology(torch.tensor(parents))
        tokens = torch.randint(0, tiny.V, (3, 7), generator=generator)
        logits = session.score(TokenTree(tokens, topology)).logits
        assert bool(torch.isfinite(logits).all())
        paths = []
        for b in range(3):
            leaf = int(torch.randint(0, 7, (1,), generator=generator))
            path = [leaf]
            while path[-1] > 0:
                path.append(parents[b][path[-1]])
            path = path[::-1]
            ids = torch.cat([state[b], tokens[b, path]])[None]
            own = None
            if encoded is not None:
                own = {
                    k: v[b : b + 1] if torch.is_tensor(v) else type(v)(v[0][b : b + 1])
                    for k, v in encoded.items()
                }
            want = target.forward(ids, encoded=own).logits[0, len(state[b]) :]
            worst = max(worst, float((logits[b, path] - want).abs().max()))
            keep = int(torch.randint(0, len(path) + 1, (1,), generator=generator))
            paths.append(path[:keep])
            state[b] = torch.cat([state[b], tokens[b, path[:keep]]])
        width = max(map(len, paths))
        session.keep(torch.tensor([[*p, *[-1] * (width - len(p))] for p in paths]).view(3, width))
        assert session.lengths == [len(s) for s in state]
        sizes.append(session.cache.used)
    assert worst < 1e-12 * 100, worst
    assert sizes != sorted(sizes) or sizes[-1] <= max(map(len, state)) * 4 // 3 + 3


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Mistral", "T5", "Bart", "GPT2"])
def test_padding_gives_no_nan(name: str) -> None:
    """Rows with an empty past, rows that are all padding below the root: finite everywhere."""
    target = tiny.target(name)
    session = target.session(3, **inputs_for(name))
    session.prefill([torch.tensor([3, 4, 5, 6, 7, 8, 9]), torch.tensor([3]), torch.zeros(0).long()])
    valid = torch.tensor([[True] * 4, [True] + [False] * 3, [True, True, False, False]])
    tree = TokenTree(torch.full((3, 4), 5), Topology.of([-1, 0, 0, 1]), valid)
    logits = session.score(tree).logits
    assert bool(torch.isfinite(logits).all())
    session.keep(torch.tensor([[0, 1, 3], [-1, -1, -1], [0, -1, -1]]))
    assert session.lengths == [10, 1, 1]
    logits = session.score(tree).logits
    assert bool(torch.isfinite(logits).all())


class Wide:
    """Bushy drafts of random tokens: many nodes close to the end of the context."""

    name = "wide"

    def begin(self, context: Context, target: Any, **inputs: Any) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def propose(self, context: Context, shape: Shape) -> TokenTree:
        topology = Topology.of([-1, *[0] * 8, *range(1, 9), *range(9, 17)])
        roots = context.roots()
        shift = torch.arange(topology.nodes) * 3
        return TokenTree((roots[:, None] + shift) % tiny.V, topology)

    def observe(self, step: Any) -> None:
        pass

    def select(self, rows: Sequence[int]) -> None:
        pass


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Bart", "Whisper"])
def test_up_to_the_last_position(name: str) -> None:
    """A ragged batch with wide trees decodes right up to the end of the position table."""
    model = tiny.facade(name)
    limit = tiny.CONTEXT
    assert model.target.max_length == limit
    options: dict[str, Any] = {"max_new_tokens": 400, "ignore_end": True}
    if name == "Whisper":
        options["inputs"] = {"input_features": tiny.features(name, "float64")}
        prompts: list[Any] = ["", "", ""]
    elif name == "Bart":
        prompts = tiny.prompts()
    else:
        prompts = tiny.prompts((limit - 1, limit - 9, limit - 30))
    plain = model.generate(prompts, drafter="none", **options)
    for policy in (Fixed(Wide(), Shape(40, 6, 8)), Fixed(PromptLookup(), Shape(16, 16, 1))):
        for out, want in zip(
            model.generate(prompts, drafter=policy, **options), plain, strict=True
        ):
            assert out.tokens == want.tokens and out.finish_reason == "length"
            assert any("cut from 400" in note for note in out.notes)
    if not model.target.encoder_decoder:
        network = tiny.network(name)
        for ids, want in zip(prompts, plain, strict=True):
            assert len(ids) + len(want.tokens) == limit
            with torch.no_grad():
                full = torch.cat([ids, torch.tensor(want.tokens)])
                tops = network(full[None]).logits[0].argmax(-1)
            assert tops[len(ids) - 1 : -1].tolist() == want.tokens
    else:
        assert [len(o.tokens) for o in plain] == [limit - 1] * 3


def test_flash_attention_is_refused() -> None:
    model = tiny.fresh("Llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="flash attention takes no tree mask"):
        HubTarget(model)


def test_encoder_inputs_are_asked_for_by_name() -> None:
    with pytest.raises(InvalidInputError, match="needs encoder inputs"):
        tiny.target("T5").session(1)
    with pytest.raises(InvalidInputError, match="takes no encoder inputs"):
        tiny.target("Llama").session(1, input_ids=torch.tensor([[1]]))
    with pytest.raises(InvalidInputError, match="input_features"):
        tiny.target("Whisper").session(1, input_ids=torch.tensor([[1]]))


def test_a_recurrent_state_says_what_it_cannot() -> None:
    target = tiny.target("Mamba2")
    session = target.session(1)
    session.prefill([torch.tensor([3, 4, 5])])
    with pytest.raises(UnsupportedModelError, match="cannot forget"):
        session.truncate([2])
    session.truncate([3])
    with pytest.raises(UnsupportedModelError, match="one row"):
        session.fork([0, 0])
    with pytest.raises(UnsupportedModelError, match="one row at a time"):
        target.session(2)


def test_recurrent_pending_tokens_are_replayed() -> None:
    """More than 16 tokens accepted in dribs and drabs, each short of its whole block."""
    target = tiny.target("Mamba2")
    session = target.session(1)
    state = torch.tensor([3, 4, 5])
    session.prefill([state])
    generator = torch.Generator().manual_seed(2)
    for _ in range(12):
        tokens = torch.randint(0, tiny.V, (1, 5), generator=generator)
        logits = session.score(TokenTree(tokens, chain_topology(5))).logits[0]
        want = target.forward(torch.cat([state, tokens[0]])[None]).logits[0, len(state) :]
        assert float((logits - want).abs().max()) < 1e-5
        session.keep(torch.tensor([[0, 1, 2]]))
        state = torch.cat([state, tokens[0, :3]])
        assert session.lengths == [len(state)]


@pytest.mark.parametrize("name", ["Bloom", "Mamba", "Mamba2"])
def test_the_probe_sees_what_a_model_cannot(name: str) -> None:
    """The routes that the check at load turned down really are wrong, or refused."""
    target = HubTarget(tiny.network(name), reach="step" if name == "Mamba" else "chain")
    target.reach = "tree" if name == "Bloom" else "chain"
    parents = (-1, 0, 0, 1, 1, 3) if name == "Bloom" else (-1, 0, 1, 2)
    if name == "Mamba2":
        assert probe_error(target, parents) < 1e-5
        with pytest.raises(InvalidInputError):
            probe_error(target, (-1, 0, 0, 1))
        return
    try:
        error = probe_error(target, parents)
    except (RuntimeError, ValueError, IndexError):
        return
    assert error > 1e-3


class Faulty(TableSession):
    """A session with one planted fault."""

    fault = ""

    def score(self, tree: TokenTree, *, taps: Taps | None = None) -> Scores:
        scores = super().score(tree, taps=taps)
        if self.fault == "siblings" and tree.nodes > 2:
            # what a causal mask without the tree does: a node sees the sibling before it
            state = self._last()[:, None]
            rows = []
            for token in tree.tokens.unbind(1):
                state = self.target.push(state, token[:, None])
                rows.append(state)
            return Scores(self.target.logits(torch.cat(rows, 1)))
        return scores

    def keep(self, path: torch.Tensor) -> None:
        if self.fault == "keep":  # keeps the first nodes instead of the path
            steps = torch.arange(path.shape[1])
            path = torch.where(path >= 0, steps, -1)
        super().keep(path)

    def truncate(self, lengths: Sequence[int]) -> None:
        if self.fault != "truncate":
            super().truncate(lengths)

    def fork(self, rows: Sequence[int]) -> TableSession:
        if self.fault == "order":
            rows = sorted(rows)
        twin = super().fork(rows)
        if self.fault == "alias":
            self._states[list(rows)] = 0
        return twin


@pytest.mark.parametrize("fault", ["siblings", "keep", "truncate", "order", "alias"])
def test_the_contract_sees_planted_faults(fault: str) -> None:
    class Target(TableTarget):
        def session(self, batch: int, **inputs: Any) -> TableSession:
            session = Faulty(self, batch)
            session.fault = fault
            return session

    target = Target(vocab_size=9)
    with pytest.raises(AssertionError):
        check_target(target)


def test_table_target_is_a_function_of_the_prefix() -> None:
    target = TableTarget(vocab_size=5, seed=9)
    again = TableTarget(vocab_size=5, seed=9)
    ids = torch.tensor([[0, 1, 2], [2, 1, 0], [0, 0, 0]])
    logits = target.logits(target.state(ids))
    assert torch.equal(logits, again.logits(again.state(ids)))
    assert len({tuple(row) for row in logits.tolist()}) == 3
    other = TableTarget(vocab_size=5, seed=10)
    assert not torch.equal(logits, other.logits(other.state(ids)))
    markov = TableTarget(vocab_size=5, seed=9, order=1)
    tails = markov.logits(markov.state(torch.tensor([[0, 1], [3, 1], [1, 1]])))
    assert torch.equal(tails[0], tails[1]) and torch.equal(tails[0], tails[2])
    wide = TableTarget(vocab_size=20_000, sharpness=2.0)
    sample = wide.logits(torch.tensor(3))
    assert abs(float(sample.mean())) < 0.05 and abs(float(sample.std()) - 2.0) < 0.05


@pytest.mark.parametrize("options", [{"vocab_size": 0}, {"vocab_size": 5, "order": 60}])
def test_table_target_refuses_bad_sizes(options: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError):
        TableTarget(**options)


def test_slot_session_is_what_attention_models_get() -> None:
    assert isinstance(tiny.target("Llama").session(2), SlotSession)
