"""Folders that are written as a whole, or not at all."""

from pathlib import Path

import pytest

from isthmus.errors import BrokenFileError, InvalidInputError
from isthmus.folders import check_replaceable, kept, published


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "deep" / "model"
    for text in ("one", "two"):
        with published(folder) as part:
            assert part.parent == folder.parent
            (part / f"{text}.json").write_text(text)
            (part / f"{text}.json").chmod(0o600)
            (part / "within").mkdir()
        assert sorted(p.name for p in folder.iterdir()) == [f"{text}.json", "within"]
        assert (folder / f"{text}.json").stat().st_mode & 0o777 == 0o644
    assert folder.stat().st_mode & 0o777 == 0o755
    assert list(folder.parent.iterdir()) == [folder], "nothing is left beside it"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_block_leaves_what_was_there(tmp_path, error):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(error), published(folder) as part:
        (part / "new").write_text("half")
        raise error
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "old"]


def test_what_cannot_be_written_or_replaced_is_refused_in_one_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(BrokenFileError, match="cannot be written"), published(file / "model"):
        pass
    with pytest.raises(InvalidInputError, match="is a file"):
        check_replaceable(file, ("mark",), "drafter")
    with pytest.raises(InvalidInputError, match="no drafter"):
        check_replaceable(tmp_path, ("mark",), "drafter")
    check_replaceable(tmp_path, ("file",), "drafter")
    check_replaceable(tmp_path / "new", ("mark",), "drafter")


def test_equal_keys_have_one_place_and_a_folder_that_cannot_be_made_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    places = []
    for key in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3}):
        with kept("things", "thing", key) as place:
            places.append(place)
    assert places[0] == places[1] != places[2] and not places[0].exists()
    assert places[0].parent == tmp_path / "things"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "file"))
    with pytest.raises(BrokenFileError, match="ISTHMUS_CACHE"), kept("things", "thing", 1):
        pass
