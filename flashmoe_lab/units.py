"""Bytes in words, for people: decimal units, three digits. Figures that are computed with stay
integers of bytes."""


def format_nbytes(nbytes: float) -> str:
    """Like "7.08 MB"; GB is 10**9 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:.0f} B"
