"""Contract checks for whoever writes a part: each raises AssertionError and says what broke."""

from isthmus.testing.acceptances import check_acceptance, emitted_laws
from isthmus.testing.codecs import check_codec
from isthmus.testing.drafters import check_drafter, check_tree
from isthmus.testing.lenses import check_lens
from isthmus.testing.policies import check_policy
from isthmus.testing.statistics import StringTest, goodness_of_fit, string_test
from isthmus.testing.streaming import check_streaming
from isthmus.testing.surgeries import check_surgery
from isthmus.testing.targets import check_target
from isthmus.testing.trained import check_trained

__all__ = [
    "StringTest",
    "check_acceptance",
    "check_codec",
    "check_drafter",
    "check_lens",
    "check_policy",
    "check_streaming",
    "check_surgery",
    "check_target",
    "check_trained",
    "check_tree",
    "emitted_laws",
    "goodness_of_fit",
    "string_test",
]
