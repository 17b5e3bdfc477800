"""Every system keeps the contract of the role that it says it plays."""

from typing import Any

import pytest

from isthmus import registry, testing
from isthmus.decoding.drafters import ModelDrafter
from isthmus.decoding.table import TableTarget

SYSTEMS = [info.slug for info in registry.systems()]


def make(system: Any) -> Any:
    """A system as it comes, with a small draft model where it needs one."""
    if issubclass(system, ModelDrafter):
        return system(TableTarget(11, seed=4, sharpness=1.5, order=2))
    return system()


@pytest.mark.parametrize("slug", SYSTEMS)
def test_contract(slug: str) -> None:
    system: Any = registry.load(slug)
    role = getattr(system, "role", None)
    assert isinstance(role, str), f"{system.__name__} must say its role"
    if role == "drafter":
        testing.check_drafter(lambda: make(system))
    elif role == "acceptance":
        testing.check_acceptance(make(system))
    elif role == "policy":
        testing.check_policy(make(system))
    else:
        assert not hasattr(testing, f"check_{role}"), f"run the contract of {role} here"
