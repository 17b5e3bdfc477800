"""The contract of a lens: its identities hold, and its explanations survive their files."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.lenses.explanation import Explanation
from isthmus.roles import Lens


def check_lens(lens: Lens, subject: Any, given: str) -> None:
    """Check that a lens keeps the contract of :class:`isthmus.roles.Lens`.

    It explains with at least one identity, and all of them hold; it says the same twice; the page
    stands alone; what is saved is read back bit for bit; and no hook is left on the subject.

    Args:
        lens: The lens.
        subject: What it looks into, as ``lens.open`` gives it.
        given: An input.

    Raises:
        AssertionError: The contract is broken; the message says where.
    """
    assert isinstance(lens, Lens), "a lens has open() and explain()"
    first, second = (lens.explain(subject, given) for _ in range(2))
    assert isinstance(first, Explanation), "explain() must give an Explanation"
    assert first.checks, "an explanation without an identity cannot be trusted"
    assert first.trusted, "; ".join(str(c) for c in first.checks if not c.passed)
    assert first.arrays or first.tables or first.graph, "it explains nothing"
    assert first.arrays.keys() == second.arrays.keys(), "one input, two explanations"
    for name, array in first.arrays.items():
        assert np.array_equal(array.values, second.arrays[name].values), f"{name} differs"
    json.dumps(first.to_dict(), allow_nan=False)
    page = first.html()
    for foreign in ("<script", "http://", "https://", "url("):
        assert foreign not in page, f"the page holds {foreign}"
    with tempfile.TemporaryDirectory() as place:
        first.save(Path(place) / "out")
        again = Explanation.load(Path(place) / "out")
    assert str(again) == str(first), "it reads otherwise after a file"
    for name, array in first.arrays.items():
        assert np.array_equal(array.values, again.arrays[name].values), f"{name} changes in a file"
    target = getattr(subject, "target", None)
    model = getattr(target or subject, "model", subject)
    for module in getattr(model, "modules", list)():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        assert not hooks, f"a hook is left on {type(module).__name__}"
