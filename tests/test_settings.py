from __future__ import annotations

from dataclasses import dataclass

import pytest

from isthmus.errors import InvalidInputError
from isthmus.settings import changed, pairs


@dataclass(frozen=True)
class Settings:
    gain: float = 1.0
    widths: tuple[int, ...] = (2,)
    on: bool = True
    kind: str = "plain"


def test_settings_from_words():
    made = changed(Settings(), {"gain": "0.5", "widths": "[4, 4]", "on": "false", "kind": "7"})
    assert made == Settings(0.5, (4, 4), False, "7")
    with pytest.raises(InvalidInputError, match="no setting 'gian'; eagle has: gain"):
        changed(Settings(), {"gian": "1"}, "eagle")
    with pytest.raises(InvalidInputError, match="on takes values like True"):
        changed(Settings(), {"on": "perhaps"})
    with pytest.raises(InvalidInputError, match=r"--plan takes name=value, got 'steps'"):
        pairs(["steps"], "--plan")
