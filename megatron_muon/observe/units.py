"""Amounts and rates as text, each in the unit that fits."""

from __future__ import annotations


def amount(num_bytes: float) -> str:
    """Bytes, in binary units."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def count(number: float) -> str:
    """A number of parameters or elements."""
    for suffix, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {suffix}"
    return f"{number:.0f}"


def bandwidth(bytes_per_s: float) -> str:
    """Bytes per second, in decimal units."""
    return _decimal(bytes_per_s, "B/s")


def arithmetic(flops_per_s: float) -> str:
    """FLOPs per second."""
    return _decimal(flops_per_s, "FLOP/s")


def work(flops: float) -> str:
    """FLOPs."""
    return _decimal(flops, "FLOP")


def _decimal(value: float, unit: str) -> str:
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value / 1e3:.3g} k{unit}"
