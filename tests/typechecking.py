"""Checks the annotations that say shapes while the tests run; an int serves where a float is asked for (PEP 484)."""

import inspect
import re
import sys

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


def jaxtyped(*, typechecker):
    """As jaxtyping's own, for what says shapes."""
    return lambda found: _jaxtyped(found, typechecker=typechecker) if says_shapes(found) else found


def install(modules):
    """Has these modules checked when they are imported."""
    jaxtyping.jaxtyped = jaxtyped
    jaxtyping.install_import_hook(modules, "typechecking.checked")
