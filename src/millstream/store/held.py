"""A folder that one process writes at a time, where no system keeps a lock: whoever writes holds a lease, and beats."""

import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Iterator

from millstream.errors import RequestError, RunError, setting
from millstream.store.contract import UNNAMED, Store
from millstream.store.lease import Leases, beating

PATIENCE = 30.0
"""Seconds without a beat after which a writer on another machine is taken for dead."""
_WRITER = "writer"


class Held:
    """What this process holds, until it leaves or is taken for dead."""

    def __init__(self, leases: Leases, told: str) -> None:
        self._leases, self._told = leases, told

    def check(self) -> None:
        """Raises RunError if another process may have taken over."""
        if not self._leases.fresh:
            raise RunError(
                f"the server could not be reached for {self._leases.patience:.0f} seconds, and another millstream may "
                f"be writing {self._told} by now. Run the same command again to go on"
            )


@contextlib.contextmanager
def held(store: Store, told: str, patience: float = PATIENCE) -> Iterator[Held]:
    """Hold what the leases in `store` are of, to the end of the block. Raises RequestError, which names who has it.

    After a kill -9 on this machine the next process has it at once; after one on another, when `patience` is over.
    """
    refuse_without_claims(store)
    leases = Leases(store, own_name(), patience=patience)
    with beating(leases):
        _take(leases, store, told)
        try:
            yield Held(leases, told)
        finally:
            with contextlib.suppress(OSError):  # the next one waits for our beat, then
                leases.done(_WRITER)


def refuse_without_claims(store: Store) -> None:
    """Raises RequestError for a store where two processes can both be the first to have made a file."""
    # Where nobody lists it who looks meanwhile whether the folder is empty.
    name = f"claims{UNNAMED}/{secrets.token_hex(4)}"
    made = [store.create(name, b"1"), store.create(name, b"2")]
    store.delete(name)
    if made != [True, False]:
        raise RequestError(
            f"{store.url} lets two processes make the same file (it has no conditional writes: If-None-Match), so that "
            f"nothing keeps a second run out; give {setting('out')} in another bucket, or a folder"
        )


def _take(leases: Leases, store: Store, told: str) -> None:
    first: tuple[str, bytes] | None = None
    while not leases.take(_WRITER):
        holder = leases.holder(_WRITER) or ""
        beat = f"beats/{holder}"
        if is_gone(holder):
            store.delete(beat)
            continue
        now = holder, b""
        with contextlib.suppress(FileNotFoundError):  # it may just have left
            now = holder, store.read(beat) if holder else b""
        first = first or now
        if now != first or is_alive(holder):
            host, pid, *_ = [*holder.split("."), "", ""]
            raise RequestError(
                f"another millstream is writing {told} (process {pid} of {host}); wait for it, or name another place"
            )
        threading.Event().wait(min(1.0, leases.patience / 10))


def own_name() -> str:
    """A name that no other process has ever had. On Linux others of this machine can tell whether it still runs."""
    host = "".join(each if each.isalnum() or each == "-" else "-" for each in socket.gethostname()) or "-"
    return ".".join((host, str(os.getpid()), *_machine(), _started(os.getpid()) or "", secrets.token_hex(4)))


def is_gone(name: str) -> bool:
    """Whether a process of this machine with such a name has ended; false where that cannot be told.

    >>> is_gone(own_name()), is_gone("elsewhere.1.a.b.c.d")
    (False, False)
    """
    return _started_of(name) == ""


def is_alive(name: str) -> bool:
    """Whether it runs, on this machine."""
    return bool(_started_of(name))


def _started_of(name: str) -> str | None:
    """When a process of this machine was started, "" if it has ended; None if it is none of this machine."""
    parts = name.split(".")
    if len(parts) != 6 or not parts[4] or tuple(parts[2:4]) != _machine():
        return None
    return parts[4] if _started(int(parts[1])) == parts[4] else ""


def _machine() -> tuple[str, str]:
    """This boot of this machine, and which processes are seen from here: containers have their own."""
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()[:8]
        return boot, os.readlink("/proc/self/ns/pid").strip("pid:[]")
    return "", ""


def _started(pid: int) -> str | None:
    """When a process was started, as Linux counts it: proc(5), after the name, which may have anything in it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()
