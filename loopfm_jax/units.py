"""Units, and numbers of any size for people."""

GIB = 2**30
DAY_MS = 86_400_000


def short(n: float) -> str:
    """999, 2.5k, 16M, 1B."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= 0.9995 * unit:  # else it would be rounded up to 1e+03 of the one below
            return f"{n / unit:.3g}{letter}"
    return f"{n:.3g}"
