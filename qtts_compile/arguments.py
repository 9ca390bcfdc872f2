"""Checks of the whole numbers that users give, by the name of the argument."""

from __future__ import annotations

from collections.abc import Collection


def check_whole_number(name: str, value: object, least: int = 1, most: int | None = None, why: str = "") -> None:
    """Raise ``TypeError`` unless ``value`` is an int, and ``ValueError`` unless it is ``least`` to ``most``; ``why`` ends the latter's message."""
    if type(value) is not int:
        raise TypeError(f"{name}={value!r}: give a whole number, of type int")
    if value < least or (most is not None and value > most):
        wanted = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}={value}: give {wanted}{why}")


def check_whole_numbers(name: str, values: object, least: int = 1, most: int | None = None) -> None:
    """Raise as :func:`check_whole_number` for each of ``values``, and ``TypeError`` for what is no collection."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Collection):
        raise TypeError(f"{name}={values!r}: give a tuple or list of whole numbers, also for a single one")
    for index, value in enumerate(values):
        check_whole_number(f"{name}[{index}]", value, least, most)
