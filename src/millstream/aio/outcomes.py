"""What becomes of a request: exactly one outcome, a reply or a fault."""

from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Returned(Generic[R]):
    """The value that request number `index` (in source order) ended with, after `seconds` and `attempts`."""

    index: int
    value: R
    seconds: float
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class Fault:
    """How request number `index` failed, as data.

    `kind` is timeout, deadline, cancelled, error, or what the function's own errors call themselves (their attribute
    `kind`); `error` is the exception of the last attempt. `faults` are those of a race in which nobody won. `held`: it
    was given up only because nothing else was left to do; asked again later, it may succeed.
    """

    index: int
    kind: str
    message: str
    seconds: float
    attempts: int = 1
    error: Any = None
    faults: "tuple[Fault, ...]" = ()
    held: bool = False


Outcome: TypeAlias = Returned[R] | Fault
