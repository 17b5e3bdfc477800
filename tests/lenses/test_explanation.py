"""Explanations: they say which checks failed, and come back from files as they were."""

import base64
import io
import json
import re

import numpy as np
import pytest

from isthmus.errors import BrokenFileError, InvalidInputError, MismatchError
from isthmus.lenses.explanation import Array, Check, Edge, Explanation, Graph, visible

SCORES = Array(
    np.array([[0.5, -1.0], [0.25, 0.0]]), ("layer", "token"), (("0", "1"), ("<s>", "a b")), True
)
GRAPH = Graph(
    {"x0": (0, 0), "x1": (1, 0), "y1": (1, 1)},
    [Edge("x0", "y1", 0.75, "head 3"), Edge("x1", "y1", 0.25)],
    ("<s>", "a"),
    ("embedding", "layer 1"),
)


def made(**changes):
    told = {
        "method": "test-lens",
        "model": {"class": "Net", "parameters": 12, "sha256": "ab" * 32},
        "inputs": ["source: <script>alert(1)</script>"],
        "target": "token & place",
        "arrays": {"score": SCORES, "total": Array(np.array([1.0, -3.0]), ("t",), (("a", "b"),))},
        "tables": {"rows": [{"token": "<b>", "score": 0.123456}]},
        "checks": [Check("sum of parts", 1e-7, 1e-4)],
        "graph": GRAPH,
        "params": {"norm": True},
        "seconds": 0.5,
    }
    return Explanation(**{**told, **changes})


def test_it_comes_back_from_a_folder_bit_for_bit(tmp_path):
    found = made()
    found.save(tmp_path / "out")
    again = Explanation.load(tmp_path / "out")
    assert np.array_equal(again.arrays["score"].values, SCORES.values)
    assert again.arrays["score"].labels == SCORES.labels and again.arrays["score"].signed
    assert again.graph == GRAPH and str(again) == str(found) and again.html() == found.html()
    found.save(tmp_path / "out")  # an older one is replaced
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("mine")
    with pytest.raises(InvalidInputError):
        found.save(tmp_path / "other")
    assert (tmp_path / "other" / "precious.txt").read_text() == "mine"


def test_damaged_folders_are_refused(tmp_path):
    made().save(tmp_path / "out")
    values = tmp_path / "out" / "arrays.safetensors"
    whole = values.read_bytes()
    values.write_bytes(whole[:-3])
    with pytest.raises(BrokenFileError, match="altered"):
        Explanation.load(tmp_path / "out")
    values.write_bytes(whole)
    record = tmp_path / "out" / "explanation.json"
    told = json.loads(record.read_text())
    del told["checks"]
    record.write_text(json.dumps(told))
    with pytest.raises(BrokenFileError, match="cannot be read"):
        Explanation.load(tmp_path / "out")
    with pytest.raises(BrokenFileError):
        Explanation.load(tmp_path / "nowhere")


def test_a_failed_check_is_loud_everywhere():
    found = made(checks=[Check("sum of parts", float("nan"), 1e-4), Check("fine", 0.0, 0.0)])
    assert not found.trusted and made().trusted and made().require()
    assert "FAILED" in str(found).splitlines()[1]
    page = found.html()
    assert page.index('class="failed"') < page.index("rows")
    assert "FAILED" in found.figure().axes[0].get_title(loc="left")
    with pytest.raises(MismatchError, match="sum of parts"):
        found.require()


def test_the_page_needs_nothing_from_outside_and_escapes_every_word():
    page = made().html()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"https?://|src=|@import|url\(", page)
    assert "token &amp; place" in page and "&lt;b&gt;" in page
    assert page.count("<path") == 2 and "head 3" in page  # the graph, with its tooltips
    assert "color-scheme: light dark" in page
    assert page.count("<td style=") >= 4  # the number behind every colour
    for tag in ("table", "svg", "div", "tr", "td", "th", "p", "details"):
        assert len(re.findall(f"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag


def test_labels_are_as_given_and_colours_have_a_scale():
    array = Array(np.array([[0.0, 0.5]]), ("layer", "token"), (("layer 1",), (" ", "a b")))
    page = made(arrays={"score": array}, graph=None).html()
    assert "<th>layer 1</th>" in page and "<th>\u00b7</th>" in page and "<th>a b</th>" in page
    assert 'class="scale"' in page and ">0.5</span>" in page
    words = Array(np.array([0.5, -1.0]), ("token",), (("<s>", "a"),), True)
    assert page.count('class="words"') == 0
    page = made(arrays={"score": words}, graph=None).html()
    assert 'class="words"' in page and ">&lt;s&gt;</span>" in page


def test_a_picture_lies_under_its_map_and_comes_back_from_a_folder(tmp_path):
    from PIL import Image

    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    grid = Array(np.array([[0.0, 1.0]]), ("row", "column"), (("1",), ("1", "2")))
    found = made(picture=picture, arrays={"map": grid}, graph=None)
    page = found.html()
    data = re.search(r'href="data:image/png;base64,([^"]+)"', page)
    assert data is not None and page.count("<rect") == 4
    read = Image.open(io.BytesIO(base64.b64decode(data.group(1))))
    assert np.array_equal(np.array(read), picture)  # by another reader
    found.save(tmp_path / "out")
    again = Explanation.load(tmp_path / "out")
    assert again.picture is not None and np.array_equal(again.picture, picture)
    assert json.loads(json.dumps(found.to_dict()))["picture"][0][0] == [0, 1, 2]
    with pytest.raises(InvalidInputError, match="uint8"):
        made(picture=picture.astype(float))


def test_many_rows_are_folded_not_left_out():
    labels = tuple(f"row{i}" for i in range(1_234))
    array = Array(np.arange(1_234.0)[:, None], ("row", "x"), (labels, ("x",)))
    page = made(arrays={"long": array}).html()
    assert all(f">{label}<" in page for label in labels)
    assert page.count("rows from") == 2


def test_pictures_are_drawn_and_carry_the_labels():
    figure = made().figure()
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["<s>", "a b"]
    bars = made().figure("total")
    assert len(bars.axes[0].patches) == 2
    with pytest.raises(InvalidInputError, match="score, total"):
        made().figure("scores")


def test_rankings_are_compared():
    a = made(arrays={"s": Array(np.array([3.0, 1.0, -2.0]), ("t",), (("a", "b", "c"),))})
    b = made(arrays={"s": Array(np.array([9.0, 4.0, 1.0]), ("t",), (("a", "b", "c"),))})
    assert a.top("s", 2) == [("a", 3.0), ("c", -2.0)]
    told = a.compare(b, "s", count=2)
    assert told["spearman"] == pytest.approx(1.0) and told["overlap"] == 0.5
    with pytest.raises(InvalidInputError, match="2 values here"):
        made(arrays={"s": Array(np.ones(2), ("t",), (("a", "b"),))}).compare(a, "s")


def test_numbers_without_meaning_are_refused():
    with pytest.raises(InvalidInputError, match="not a number"):
        Array(np.array([np.nan]), ("t",), (("a",),))
    with pytest.raises(InvalidInputError, match="labels"):
        Array(np.ones(2), ("t",), (("a",),))
    with pytest.raises(InvalidInputError, match="one or two"):
        Array(np.ones((1, 1, 1)), ("a", "b", "c"), (("a",), ("b",), ("c",)))


def test_tokens_are_visible():
    assert visible("\u0120the") == "\u00b7the" and visible("\n") == "\u21b5"
    assert visible(" ") == "\u00b7" and visible("") == "\u2205"
