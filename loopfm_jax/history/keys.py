"""What histories may be grouped by: the log's own key, a stored column, or several together."""

import numpy as np

from loopfm_jax.data.log import KEY, Log
from loopfm_jax.errors import UserError
from loopfm_jax.history.store import OWN


def key_values(log: Log, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Kind of key -> integer keys of all rows.

    Args:
      names: `key`, a column of the data's `keys`, or several of these joined by `+`.

    Raises:
      UserError: no such column, or a kind is named twice.
    """
    if not names or len(set(names)) != len(names):
        raise UserError(f"history.keys is {list(names)}: name each kind of key once, at least one")
    return {name: _together([_column(log, part) for part in name.split("+")]) for name in names}


def _column(log: Log, name: str) -> np.ndarray:
    if name == OWN:
        return log["key"]
    stored = [c.removeprefix(KEY) for c in log.columns if c.startswith(KEY)]
    if name not in stored:
        raise UserError(
            f"history.keys names {name!r}; the prepared log can group by "
            f"{', '.join((OWN, *stored))} and by several of these joined by `+`; name more columns "
            "in the data's `keys`"
        )
    return log[KEY + name].astype(np.int64)


def _together(parts: list[np.ndarray]) -> np.ndarray:
    key = parts[0]
    for part in parts[1:]:
        key = key * (int(part.max()) + 1) + part
    return key
