"""Property tests in two forms: a few examples by default, many with ``-m faults``."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings

MANY = 25  # times as many examples in the full form


def holds_for(examples: int, /, **strategies) -> Callable:
    """Turns a function of drawn values into a test, with `examples` of them by default.

    The examples are the same in every run. Fixtures cannot be asked for; helpers can be cached.
    """

    def decorate(body: Callable) -> Callable:
        @pytest.mark.parametrize(
            "form", ["short", pytest.param("full", marks=[pytest.mark.faults])]
        )
        @pytest.mark.timeout(3_600)
        def test(form: str) -> None:
            count = examples if form == "short" else MANY * examples
            checked = settings(
                max_examples=count,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            )(given(**strategies)(body))
            checked()

        test.__doc__, test.__module__ = body.__doc__, body.__module__
        return test

    return decorate
