"""What this machine has, or the group of processes that this one is confined to, as in a container."""

import os
import posixpath
from collections.abc import Iterator

from millstream.store import file_at

_PROCESS, _ROOT = "/proc/self/cgroup", "/sys/fs/cgroup"


def cores() -> int:
    """How many this process may use, or have the time of: at least one."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = _told("cpu", "cpu.max", "cpu.cfs_quota_us")
    periods = _told("cpu", "cpu.max", "cpu.cfs_period_us")
    for quota, period in zip(quotas, periods, strict=False):
        time, of = quota.split()[0], period.split()[-1]
        if time.isdigit() and of.isdigit():  # else it is "max" or -1
            own = min(own, int(time) // int(of))
    return max(1, own)


def memory() -> int | None:
    """Bytes that all processes here may have together; None if nobody tells."""
    names = getattr(os, "sysconf_names", {})
    found = [int(text) for text in _told("memory", "memory.max", "memory.limit_in_bytes") if text.isdigit()]
    if "SC_PHYS_PAGES" in names:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found, default=None)


def _told(controller: str, name: str, earlier: str) -> Iterator[str]:
    """What a file says of the groups that this process is in and of those around them: `name` in version 2 of cgroups,
    `earlier` in version 1, where each controller has its own."""
    for controllers, group in _groups():
        if controller in controllers or controllers == [""]:
            folder, file = (_ROOT, name) if controllers == [""] else (posixpath.join(_ROOT, controller), earlier)
            for each in _upwards(group):
                if text := _text(posixpath.join(folder, each, file)).strip():
                    yield text


def _groups() -> list[tuple[list[str], str]]:
    """(the controllers, the group) of this process, as Linux tells."""
    fields = [line.split(":", 2) for line in _text(_PROCESS).splitlines()]
    return [(each[1].split(","), each[2]) for each in fields if len(each) == 3]


def _upwards(group: str) -> list[str]:
    """
    >>> _upwards("/a/b"), _upwards("/")
    (['a/b', 'a', ''], [''])
    """
    names = [name for name in group.split("/") if name]
    return ["/".join(names[:count]) for count in range(len(names), -1, -1)]


def _text(path: str) -> str:
    """What a file says; nothing where there is none."""
    try:
        return file_at(path).text()
    except (OSError, UnicodeDecodeError):
        return ""
