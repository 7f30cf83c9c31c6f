"""Checks the annotations that say shapes while the tests run; an int serves where a float is asked for (PEP 484)."""

import inspect
import re
import sys
from collections import Counter
from functools import wraps

import jaxtyping
from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))

_jaxtyped = jaxtyping.jaxtyped


def says_shapes(found):
    """Whether a function's or a class's annotations name a type of jaxtyping's, or one made of them in its module.

    Functions within functions are left alone: they would be compiled anew with every call of the outer one. So is what
    says no shapes: mypy has checked it, and looking at each call again takes a third of the tests' time.
    """
    if "<locals>" in found.__qualname__:
        return False
    known = vars(sys.modules[found.__module__])
    said = " ".join(map(str, inspect.get_annotations(found).values()))
    return any(_of_shapes(known.get(name)) for name in set(re.findall(r"[A-Za-z_]\w*", said)))


def _of_shapes(known):
    made_of = [known, *getattr(known, "__args__", ())]
    return any(str(getattr(each, "__module__", "")).partition(".")[0] == "jaxtyping" for each in made_of)


MOST = 2
"""How many calls of a function are checked in a test: some are called ten thousand times."""

calls = Counter()
"""How many calls there were in this test."""


def jaxtyped(*, typechecker):
    """As jaxtyping's own, for what says shapes, and there for the first calls of each test."""

    def decorate(found):
        if not says_shapes(found):
            return found
        checking = _jaxtyped(found, typechecker=typechecker)
        if inspect.isclass(found):
            return checking

        @wraps(checking)
        def call(*args, **kwargs):
            calls[call] += 1
            return (checking if calls[call] <= MOST else found)(*args, **kwargs)

        return call

    return decorate


def install(modules):
    """Has these modules checked when they are imported."""
    jaxtyping.jaxtyped = jaxtyped
    jaxtyping.install_import_hook(modules, "typechecking.checked")
