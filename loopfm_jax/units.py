"""Units, and numbers of any size for people."""

GIB = 2**30
DAY_MS = 86_400_000


def short(n: float) -> str:
    """999, 2.5k, 16M, 1B."""
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= limit:
            return f"{n / limit:.3g}{letter}"
    return f"{n:.3g}"
