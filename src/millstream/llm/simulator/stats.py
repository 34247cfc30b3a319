"""What the simulator counts: what it saw, and what of a minute's quota is left."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields


@dataclass(slots=True)
class Stats:
    """What the server saw since it started or was reset. A request counts once its head was read.

    statuses        of the replies begun; a request that is disconnected, dropped or hangs has none
    faults          by kind, those that came up
    turned_away     by reason, before any draw: api-key, body (not valid), rpm, tpm, overload, quota
    dropped         requests that came over a connection the fault "between" had closed
    gone            requests whose client went away before they were answered
    in_flight       requests here, in service or queued; `in_service` those that hold a place of the capacity
    ids_in/ids_out  what is billed: all that came into service and did not end in an HTTP error, whether their client
                    waited for the reply or not; `ids_cached` of ids_in were read from a cache
    cost            of that, in the money of the behaviour's prices
    connections     those over which anything was asked
    bodies          distinct bodies admitted; `asked_again` those of them that were admitted more than once
    """

    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    turned_away: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    gone: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    in_service: int = 0
    most_in_service: int = 0
    queued: int = 0
    most_queued: int = 0
    ids_in: int = 0
    ids_out: int = 0
    ids_cached: int = 0
    cost: float = 0.0
    connections: int = 0
    bodies: int = 0
    asked_again: int = 0

    def bill(self, ids_in: int, ids_out: int, cached: int, price: Sequence[float]) -> None:
        """Count ids, at prices of a million of them: in prompts, in replies and, perhaps, in prompts from a cache."""
        given, told, from_cache = price if len(price) == 3 else (*price, price[0])
        self.ids_in += ids_in
        self.ids_out += ids_out
        self.ids_cached += cached
        self.cost += ((ids_in - cached) * given + cached * from_cache + ids_out * told) / 1e6

    def reset(self) -> None:
        """Forget all but what is here now."""
        fresh = Stats()
        for name in ("in_flight", "in_service", "queued"):
            setattr(fresh, name, getattr(self, name))
            setattr(fresh, f"most_{name}", getattr(self, name))
        for item in fields(self):
            setattr(self, item.name, getattr(fresh, item.name))


class Quota:
    """Units a minute: a bucket that starts full and fills steadily. More than a bucketful is admitted from a full one
    and leaves a debt."""

    def __init__(self, per_minute: int) -> None:
        self.most = self.level = float(per_minute)
        self.time = asyncio.get_running_loop().time()

    def wait(self, units: int) -> float:
        """Seconds until `units` would be admitted; 0 if they are now."""
        now = asyncio.get_running_loop().time()
        self.level = min(self.most, self.level + (now - self.time) * self.most / 60)
        self.time = now
        return max(0.0, (min(units, self.most) - self.level) * 60 / self.most)

    def take(self, units: int) -> None:
        self.level -= units
