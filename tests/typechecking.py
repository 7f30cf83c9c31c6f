"""Checks annotations while the tests run; an int serves where a float is asked for (PEP 484)."""

from beartype import BeartypeConf, beartype

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function):
    """Functions within functions are left alone: they would be compiled anew with every call of the outer one."""
    return function if "<locals>" in getattr(function, "__qualname__", "") else _checked(function)
