"""What every worker does with a unit: the call of its function, and where that is a generator, a step at a time."""

import pickle
from collections.abc import Callable, Generator
from types import GeneratorType
from typing import Any, NamedTuple

from millstream.errors import RunError


class Stepped(NamedTuple):
    """What a step gave: `kind` is "part", "done" or "error", or nothing where there was nothing to do yet."""

    kind: str
    result: Any = None


class Steps:
    """Units by number, of functions by their place among all that it was told.

    >>> steps = Steps()
    >>> steps.learn(abs, lambda n: (number for number in range(n)))
    >>> steps.begin(7, 0, -3), steps.begin(8, 1, 1)
    (Stepped(kind='done', result=3), Stepped(kind='', result=None))
    >>> steps.go_on(8), steps.go_on(8), steps.go_on(8)
    (Stepped(kind='part', result=0), Stepped(kind='done', result=None), Stepped(kind='', result=None))
    """

    def __init__(self) -> None:
        self._functions: list[Callable[[Any], Any]] = []
        self._begun: dict[int, Generator[Any]] = {}

    def learn(self, *functions: Callable[[Any], Any]) -> None:
        self._functions += functions

    def begin(self, number: int, which: int, unit: Any) -> Stepped:
        """Do a unit; one that is a generator is only begun, which is no kind of step."""
        try:
            result = self._functions[which](unit)
        except BaseException as error:
            return Stepped("error", portable(error))
        if not isinstance(result, GeneratorType):
            return Stepped("done", result)
        self._begun[number] = result
        return Stepped("")

    def go_on(self, number: int) -> Stepped:
        """The next step of a generator."""
        if number not in self._begun:
            return Stepped("")
        try:
            return Stepped("part", next(self._begun[number]))
        except StopIteration as end:
            step = Stepped("done", end.value)
        except BaseException as error:
            step = Stepped("error", portable(error))
        del self._begun[number]
        return step

    def give_up(self, number: int) -> Stepped:
        """End a generator where it is."""
        if number not in self._begun:
            return Stepped("")
        self._begun.pop(number).close()
        return Stepped("done")


def portable(error: BaseException) -> BaseException:
    """The error, or one with its words if it cannot be sent: the classes of some libraries cannot be imported."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except (pickle.PickleError, AttributeError, ImportError, TypeError, ValueError):
        return RunError(f"{type(error).__name__}: {error}")
