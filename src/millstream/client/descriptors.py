"""File descriptors, of which each connection takes one: as many as this process may have, and how many are left."""

import contextlib
import sys

from millstream.store.pipe import count_open

_MOST_OF_MACOS = 10_240  # what it takes where it says that there is no limit
_RESERVE = 16  # for files, looking up names, and what a host with two addresses takes while it is tried;
_SHARE, _LEAST = 8, 4  # of few, an eighth


def raise_limit() -> None:
    """Take as many as the system gives without asking anybody: the soft limit becomes the hard one."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft in (hard, resource.RLIM_INFINITY):
        return
    for more in (hard, _MOST_OF_MACOS):
        if more == resource.RLIM_INFINITY or more > soft:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
                return


def limit() -> int | None:
    """How many this process may have; None: any number, as far as one can know."""
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def for_connections() -> int | None:
    """How many connections may be open, beside what is open now and a reserve: at least one. None: any number."""
    most, there = limit(), count_open()
    return None if most is None or there is None else max(1, most - there - min(_RESERVE, max(_LEAST, most // _SHARE)))
