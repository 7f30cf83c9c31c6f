"""What the package raises when it is asked for something that cannot work."""


class ContinualError(ValueError):
    """A request that cannot be carried out; the message names the thing, the value and the way out."""


class StructureError(ContinualError):
    """A network whose units cannot be followed from layer to layer."""


class StructureWarning(UserWarning):
    """A network that works, but in which more units share one fate than its layers suggest."""


class FrozenWarning(UserWarning):
    """Something changed what belongs to earlier tasks; it was put back."""


class CapacityError(ContinualError):
    """No free unit is left where a new task needs one."""


class DivergenceError(ContinualError):
    """Training left numbers that are not finite; what was there before is there again."""


class DivergenceWarning(UserWarning):
    """Numbers that were not finite were left out, or put back."""


class LeakError(ContinualError):
    """A claimed output still depends on something that may move."""


def check_share(owner: str, name: str, value: float, *, above_zero: bool = False) -> float:
    """Returns ``value`` if it is a share: in [0, 1], or in (0, 1] with ``above_zero``.

    Raises:
        ContinualError: names the owner, the option and the value otherwise.
    """
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if not number or not 0 <= value <= 1 or (above_zero and value == 0):
        interval = "(0, 1]" if above_zero else "[0, 1]"
        raise ContinualError(f"{owner}: {name} must be a share in {interval}, got {value!r}.")
    return float(value)


def check_count(owner: str, name: str, value: int, *, least: int = 1) -> int:
    """Returns ``value`` if it is a whole number of at least ``least``.

    Raises:
        ContinualError: names the owner, the option and the value otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ContinualError(f"{owner}: {name} must be a whole number of at least {least}, got {value!r}.")
    return value


def check_choice(owner: str, name: str, value: object, choices: tuple[str, ...]) -> str:
    """Returns ``value`` if it is one of ``choices``.

    Raises:
        ContinualError: names the owner, the option, the value and what may stand there otherwise.
    """
    if not isinstance(value, str) or value not in choices:
        raise ContinualError(f"{owner}: {name} must be one of {', '.join(choices)}, got {value!r}.")
    return value
