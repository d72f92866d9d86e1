"""The one exception a user may cause: its text is the whole message, and the exit status is 2."""

import math
from collections.abc import Mapping


class UserError(Exception):
    """A mistake in the input, the configuration or the surroundings of a command.

    The message names the value, the limit and the fix; `cli.main` prints it without a traceback.
    """


def check_limits(
    owner: str, values: Mapping[str, float], *, low: float, high: float = math.inf
) -> None:
    """Raises UserError for the first of the named settings that is outside [low, high]."""
    for name, value in values.items():
        if not low <= value <= high:
            limit = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise UserError(f"{owner}.{name} is {value}; it must be {limit}")
