"""Names of rules: what a model can be asked for."""

from __future__ import annotations

import pytest

from mlm.base.errors import UserError
from mlm.base.names import RULES, check_rules


def test_every_rule_may_be_asked_for_with_and_without_a_cache() -> None:
    check_rules([name + end for name in ("best", *RULES) for end in ("", "+cache")])


@pytest.mark.parametrize(
    "name", ["fastest", "", "+cache", "best+best", "rms+cache+cache", "../rms"]
)
def test_any_other_name_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(UserError) as caught:
        check_rules(["rms", name], ". Or so")
    listed = ", ".join(("best", *RULES))
    assert str(caught.value) == (
        f"no rule {name!r}; choose from {listed}, each also with +cache. Or so"
    )
