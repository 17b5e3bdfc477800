"""Sparse features of a model: the reconstruction stands for the vectors, or nothing is shown."""

from pathlib import Path

import pytest
import torch
from test_sites import made

from isthmus.cli.main import main
from isthmus.errors import InvalidInputError, MismatchError, UnknownNameError, UnsupportedModelError
from isthmus.lenses.sae import SparseAutoencoder
from isthmus.lenses.sae_lens import SaeLens, Settings, splice, vectors
from isthmus.models.hub import Checkpoint
from isthmus.testing import check_lens
from isthmus.workbench import reference

TEXT = "def add(a, b):\n    return a + b"
CODE = Path(reference.__file__).read_text()
SMALL = Settings(data="code", atoms=64, steps=60, tokens=1500)


def read(name: str) -> tuple[list[str], list[str]]:
    half = len(CODE) // 2
    return [CODE[:half]], [CODE[half:]]


@pytest.fixture(scope="module")
def subject() -> Checkpoint:
    return SaeLens().open(str(reference.locate("pycode-t")))


def test_the_contract_and_the_numbers(subject: Checkpoint, tmp_path: Path) -> None:
    lens = SaeLens(Settings(**{**vars(SMALL), "kept": str(tmp_path / "sae")}), read)
    check_lens(lens, subject, TEXT)
    found = lens.explain(subject, TEXT)  # reads what was kept
    (row,) = found.tables["how well features stand for the model"]
    assert row["L0"] == 16 and row["measured on"] == "148 held-out tokens"
    assert 0.3 < row["variance explained"] < 1
    assert row["loss"] < row["with features"] < row["with means"]
    tokens = len(subject.tokenizer(TEXT).input_ids) - 1
    assert found.arrays["activation"].values.shape == (12, tokens)
    assert len(found.tables["strongest features of each token"]) == tokens
    places = found.tables["where the strongest features fire most"]
    assert len(places) == 12 and all(place["place 1"] for place in places)
    other = Settings(**{**vars(SMALL), "kept": str(tmp_path / "sae"), "site": "resid_post.0"})
    with pytest.raises(MismatchError, match=r"not of resid_post\.0"):
        SaeLens(other, read).explain(subject, TEXT)


def test_places_of_a_planted_feature(subject: Checkpoint) -> None:
    """A feature that is the vector of one token fires most where that token stands."""
    lens = SaeLens()
    batches = lens._batches(subject, [CODE], 400)
    _, site = lens.know(subject.model)
    x = vectors(subject.model, site, batches)
    flat = torch.cat([b[:, 1:].flatten() for b in batches])
    flat = flat[flat >= 0]
    place = 77
    sae = SparseAutoencoder(x.shape[1], 2, 1)
    with torch.no_grad():
        sae.shift.copy_(x.mean(0))
        centred = x[place] - x.mean(0)
        sae.encoder.copy_(torch.stack([centred, torch.zeros_like(centred)]))
    best = int((sae.before(x)[:, 0]).argmax())
    told = lens._places(subject, sae, torch.tensor([0]), sae.measure(x), x, batches)
    word = subject.tokenizer.convert_ids_to_tokens([int(flat[best])])[0]
    assert told[0]["place 1"].split(" ")[-1] == word.replace("\u0120", "\u00b7").replace(
        "\u010a", "\u21b5"
    )


def test_loss_with_means_its_own_and_a_perfect_reconstruction(subject: Checkpoint) -> None:
    lens = SaeLens()
    batches = lens._batches(subject, [CODE[:1500], CODE[1500:1800]], 400)
    assert len(batches) == 1 and (batches[0] < 0).any(), "rows of unlike length are padded"
    _, site = lens.know(subject.model)
    width = subject.model.config.hidden_size
    sae = SparseAutoencoder(width, 2 * width, 2 * width)  # all codes: x = relu-free identity
    with torch.no_grad():
        sae.atoms.copy_(torch.cat([torch.eye(width), torch.eye(width)]))
        sae.encoder.copy_(torch.cat([torch.eye(width), torch.zeros(width, width)]))
    cost = splice(subject.model, site, sae, batches)
    assert cost.itself == cost.own
    assert cost.reconstruction == pytest.approx(cost.own, abs=1e-4)
    assert cost.recovered == pytest.approx(1, abs=1e-3) and cost.means > cost.own + 0.5
    with torch.no_grad():
        sae.encoder.zero_()
        sae.shift.copy_(vectors(subject.model, site, batches).mean(0))
    assert splice(subject.model, site, sae, batches).recovered == pytest.approx(0, abs=1e-3)


def test_what_cannot_be_shown_is_refused(subject: Checkpoint) -> None:
    poor = Settings(**{**vars(SMALL), "active": 1, "steps": 1, "least": 0.9})
    with pytest.raises(MismatchError, match="share of the loss not recovered"):
        SaeLens(poor, read).explain(subject, TEXT)
    with pytest.raises(UnknownNameError, match="resid_post"):
        SaeLens(Settings(site="resid_past.1")).explain(subject, TEXT)
    with pytest.raises(InvalidInputError, match="longer text"):
        SaeLens().explain(subject, "a")
    with pytest.raises(InvalidInputError, match="no tokenizer"):
        SaeLens().explain(Checkpoint(subject.model, None, "x"), TEXT)
    with pytest.raises(UnsupportedModelError, match="decoder-only"):
        SaeLens().know(made("T5"))
    with pytest.raises(InvalidInputError, match="read="):
        SaeLens(Settings(data="x"))
    with pytest.raises(InvalidInputError, match="at least 20"):
        SaeLens(Settings(tokens=2))


def test_the_door(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(8):
        (tmp_path / "texts" / f"{i}.txt").write_text(CODE[600 * i : 600 * (i + 1)])
    words = ["explain", "", TEXT, "--lens", "sae"]
    few = [f"data={tmp_path / 'texts'}", "atoms=64", "steps=60", "least=0.2", "kept="]
    sets = [word for each in few for word in ("--set", each)]
    assert main([*words, *sets, "-o", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr().out
    assert "loss recovered" in said and "16 of 64 features a token at resid_post.2" in said
    assert "strongest features of each token" in (tmp_path / "page.html").read_text()
    assert main([*words, "--set", "layer=3"]) == 2
    assert "no setting 'layer'" in capsys.readouterr().err
