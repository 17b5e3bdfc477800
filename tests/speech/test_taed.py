"""TAED: chunks hide the future, without cross-attention it is a transducer, streams, files."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.decoding.ctc import Transcript
from isthmus.decoding.listening import Listener
from isthmus.decoding.transducer import greedy
from isthmus.errors import InvalidInputError
from isthmus.models.attention_transducer import AttentionTransducer
from isthmus.nn.conformer import Conformer
from isthmus.objectives.rnnt import rnnt_loss
from isthmus.roles import FrameScorer
from isthmus.signals.audio import Recording, Waveform, write
from isthmus.systems.speech import taed
from isthmus.systems.speech.taed import Learner, Settings, Taed, arms, judged, streamed
from isthmus.testing import check_streaming
from isthmus.training.data import Data, Translated
from isthmus.training.loop import Plan
from isthmus.training.speech import Characters, features_of
from isthmus.training.system import train
from isthmus.workbench.recogniser import Recogniser

TINY = Settings(16, 24, 2, 2, 5, 4, 4, 2, 48, 24, 4, dropout=0.0, batch_size=8, longest=12)
TONES = {"a": 400.0, "b": 1200.0, "c": 2500.0}


def spoken(count: int, seed: int) -> list[Translated]:
    """Words are tones of 0.2 s; what is to be written has them in reverse order."""
    generator = torch.Generator().manual_seed(seed)
    t, found = torch.arange(3200) / 16000, []
    for _ in range(count):
        size = int(torch.randint(1, 4, (), generator=generator))
        said = ["abc"[i] for i in torch.randint(3, (size,), generator=generator).tolist()]
        parts = [
            torch.cat([0.3 * torch.sin(2 * torch.pi * TONES[w] * t), torch.zeros(1600)])
            for w in said
        ]
        sound = torch.cat([torch.zeros(800), *parts])
        sound = sound + 0.005 * torch.randn(len(sound), generator=generator)
        text = "".join(said)
        found.append(Translated(Recording(samples=sound), "en", text, text[::-1].upper()))
    return found


DATA = Data(spoken(60, 0), spoken(12, 1), "tones")


def made(settings: Settings = TINY) -> Taed:
    torch.manual_seed(0)
    system = Taed.untrained(settings, DATA)
    system.module.eval()
    return system


def network(**options: Any) -> AttentionTransducer:
    torch.manual_seed(0)
    encoder = Conformer(16, 16, 2, 2, kernel=5, factor=4, channels=4, causal=True, chunk=4)
    return AttentionTransducer(encoder, 5, inner=32, chunk=4, **options).double().eval()


@torch.no_grad()
def loosen(net: AttentionTransducer, texts: Callable[[], list[Transcript]]) -> None:
    """An untrained network writes nothing or does not stop; make blanks rarer until it writes."""
    net.head.weight *= 6
    while min(len(text.tokens) for text in texts()) < 3:
        net.head.bias[0] -= 0.5


@torch.no_grad()
def test_logits_of_a_chunk_do_not_change_when_later_sound_does() -> None:
    net = network()
    features = torch.randn(1, 16, 64, dtype=torch.float64)  # 16 frames, 4 chunks
    length, targets = torch.tensor([64]), torch.tensor([[1, 2, 3]])
    logits: Any = net(features, length, targets)[0]
    assert logits.shape == (1, 16, 4, 5)
    for chunk in range(3):
        other, heard = features.clone(), 16 * chunk + 13  # what the chunk's last frame reaches
        other[:, :, heard:] = torch.randn_like(other[:, :, heard:])
        changed: Any = net(other, length, targets)[0]
        end = 4 * chunk + 4
        torch.testing.assert_close(changed[:, :end], logits[:, :end], atol=1e-12, rtol=0)
        assert float((changed - logits)[:, end:].abs().max()) > 1e-3
        other[:, :, heard - 1] += 1.0
        moved: Any = net(other, length, targets)[0]
        assert float((moved - logits)[:, end - 4 : end].abs().max()) > 1e-4


@torch.no_grad()
def test_with_cross_attention_zeroed_it_is_the_transducer() -> None:
    net, plain = network(), network(cross=False)
    for layer in net.layers:
        torch.nn.init.zeros_(layer.cross_attn.out_proj.weight)  # type: ignore[union-attr, arg-type]
        torch.nn.init.zeros_(layer.cross_attn.out_proj.bias)  # type: ignore[union-attr, arg-type]
    plain.load_state_dict(net.state_dict(), strict=False)
    features = torch.randn(2, 16, 40, dtype=torch.float64)
    frames, targets = torch.tensor([40, 25]), torch.tensor([[1, 2, 4], [3, 3, 0]])
    a, b = net(features, frames, targets), plain(features, frames, targets)
    for one, other in zip(a, b, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other)
    memory, lengths = plain.encoder(features, frames)
    states = plain.predict(torch.nn.functional.pad(targets, (1, 0)), memory, lengths[:, None])
    # the predictor of a transducer is one sequence of states for all frames
    joint = plain.head(
        (plain.from_sound(memory)[:, :, None] + plain.from_text(states[:, 0])[:, None]).tanh()
    )
    torch.testing.assert_close(b[0], joint)
    assert isinstance(net, FrameScorer)
    assert greedy(net, memory, lengths, chunk=4, longest=9) == greedy(
        plain, memory, lengths, chunk=4, longest=9
    )


@torch.no_grad()
def test_the_search_reads_with_the_states_that_training_has() -> None:
    """Log p of the path that was taken, by the logits of training with that text as the target."""
    net = network()
    features, frames = torch.randn(2, 16, 64, dtype=torch.float64), torch.tensor([64, 41])
    memory, lengths = net.encoder(features, frames)
    loosen(net, lambda: greedy(net, memory, lengths, chunk=4, max_symbols=1))
    for row, found in enumerate(greedy(net, memory, lengths, chunk=4, max_symbols=1)):
        assert len(found.tokens) > 2
        text = torch.tensor([found.tokens])
        logits: Any = net(features[row : row + 1, :, : frames[row]], frames[row : row + 1], text)[0]
        log_probs, total, u = logits[0].log_softmax(-1), 0.0, 0
        for t in range(int(lengths[row])):
            if u < len(found.tokens) and found.frames[u] == t:
                assert int(log_probs[t, u].argmax()) == found.tokens[u]
                total += float(log_probs[t, u, found.tokens[u]])
                u += 1
            else:
                assert int(log_probs[t, u].argmax()) == 0
                total += float(log_probs[t, u, 0])
        assert found.logprob == pytest.approx(total, abs=1e-5)


def test_the_loss_is_that_of_the_transducer_and_the_decoder() -> None:
    system = made()
    learner = Learner(system, DATA, Plan(10))
    batch = learner.batch(3)
    logits, own, heard = system.module(batch.features, batch.frames, batch.targets)
    wanted = rnnt_loss(logits, batch.targets, heard, batch.target_lengths).sum()
    for row, length in enumerate(batch.target_lengths.tolist()):
        text = [*batch.targets[row, :length].tolist(), 0]
        log_probs = own[row].log_softmax(-1)
        wanted = wanted - sum(log_probs[u, token] for u, token in enumerate(text))
    torch.testing.assert_close(learner.loss(batch).total, wanted)
    again = learner.batch(3)
    assert torch.equal(batch.features, again.features)


@pytest.mark.parametrize("cross", [True, False])
def test_the_stream_gives_what_the_whole_gives(cross: bool) -> None:
    system = made(replace(TINY, cross=cross))
    generator = torch.Generator().manual_seed(5)
    sound = 0.1 * torch.randn(2, 15_000, generator=generator)
    loosen(system.module, lambda: system.answer(list(sound)))
    listener = system.listener()
    check_streaming(listener, sound)
    state = listener.init_state(2)
    first, state = listener.step(sound[:, : 4 * 160 * 3 + 200], state)
    assert first.shape[2] == 4 and listener.lookahead == 4 * 160 * 3 + 200
    rest, state = listener.step(sound[:, 4 * 160 * 3 + 200 :], state)
    last = listener.flush(state)
    whole = system.answer(list(sound))
    assert sum(len(t.tokens) for t in whole) > 4
    out = torch.cat([first, rest, last], 2)
    for row, found in enumerate(whole):
        assert out[row].T[out[row].T > 0].tolist() == list(found.tokens)
        assert tuple(state.search.tokens[row]) == found.tokens == streamed(system, sound[row], 777)
    none = listener.init_state(1)
    assert listener.flush(none).shape == (1, 10, 0)
    assert system.answer([torch.zeros(1)])[0].tokens == streamed(system, torch.zeros(1))


def test_only_causal_systems_stream() -> None:
    with pytest.raises(InvalidInputError, match="train it with chunk=8"):
        made(replace(TINY, chunk=0)).listener()
    with pytest.raises(InvalidInputError, match="only a conformer may be causal"):
        Conformer(16, 16, 1, 2, block="e-branchformer", causal=True)
    system = made()
    system.mel.normalise = True
    with pytest.raises(InvalidInputError, match="normalised over the whole"):
        Listener(system.module.encoder, system.mel, system.search, chunk=4, factor=4)


def test_it_learns_to_write_in_reverse_and_is_kept(tmp_path: Path) -> None:
    plan = Plan(120, learning_rate=8e-3, warmup_steps=20, validate_every=120)
    settings = replace(TINY, depth=1, layers=1, chunk=0)
    system = train(Taed, DATA, settings, plan, out=tmp_path / "taed")
    assert isinstance(system, Taed)
    first = made(settings)
    assert judged(system, DATA.valid)["error"] < 0.8 * judged(first, DATA.valid)["error"]
    write(tmp_path / "a.wav", Waveform(DATA.valid[0].sound.at(16000)[None], 16000))
    read = Taed.from_pretrained(tmp_path / "taed")
    again = read.run(str(tmp_path / "a.wav"))
    assert again == system.run(str(tmp_path / "a.wav"))
    assert len(again.record["written_at_s"]) == len(again.text)
    sounds = [record.sound.at(16000) for record in DATA.valid[:3]]
    alone = [read.answer([sound])[0].tokens for sound in sounds]
    assert [t.tokens for t in read.answer(sounds)] == alone  # neighbours change nothing


def test_the_decoder_alone_writes_until_it_ends_the_text() -> None:
    system = made(replace(TINY, transduce=False, chunk=0))
    learner = Learner(system, DATA, Plan(10))
    batch = learner.batch(0)
    logits, own, _ = system.module(batch.features, batch.frames, batch.targets, transduce=False)
    assert logits is None and own.shape[1] == batch.targets.shape[1] + 1
    assert learner.loss(batch).total > 0
    with torch.no_grad():
        system.module.word.bias[0] = -99.0
        assert {len(t.tokens) for t in system.answer([torch.randn(9000)] * 2)} == {12}
        system.module.word.bias[0] = 99.0
        assert system.answer([torch.randn(9000)])[0].tokens == ()


def test_arms_are_of_one_size_and_start_from_one_ear(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        name: sum(p.numel() for p in Taed(settings, Characters("-0123456789")).module.parameters())
        for name, (settings, _) in arms(Taed.scales["small"], short=False).items()
    }
    assert max(sizes.values()) < 1.01 * min(sizes.values()), sizes
    torch.manual_seed(1)
    heard = Recogniser(TINY.hearing(), Characters("abc"))
    monkeypatch.setattr(taed, "ear", lambda data, settings: heard)
    assert made(replace(TINY, ear=True)).module.encoder.chunk == 4  # it fits other chunks, too
    system = made(replace(TINY, ear=True, chunk=0))
    features, frames = features_of(system.mel, [DATA.valid[0].sound.at(16000)])
    heard.module.eval()
    with torch.no_grad():
        theirs = heard.module.head(system.module.encoder(features, frames)[0]).log_softmax(-1)
        read: Any = heard.module(*features_of(heard.mel, [DATA.valid[0].sound.at(16000)]))[0]
    assert torch.equal(theirs, read[-1])
