"""What an ask run has spent, and the most that it may."""

import math
from collections.abc import Mapping
from typing import Any

from millstream.runs.ask.client import Client
from millstream.runs.ask.requests import Request


class Purse:
    """What has been spent, and a `Gate` that no attempt passes that could cost more than `most`.

    Prices are those of a million ids in prompts and in replies. An attempt is counted with what it may cost as long as
    it runs, and with what the server reports as soon as it has.
    """

    def __init__(self, price: tuple[float, float], most: float | None, client: Client) -> None:
        self.price, self.most, self._client = price, most, client
        self._committed = 0.0  # what runs now may cost
        self._earlier = 0.0  # what earlier runs paid

    @property
    def cost(self) -> float:
        return self._earlier + self._of(self._client.used) + self._of(self._client.wasted)

    def pay_earlier(self, usage: Mapping[str, Any]) -> None:
        self._earlier += self._of(usage)

    def wait(self, item: Any, now: float) -> float:
        assert self.most is not None
        return math.inf if self.cost + self._committed + self._likely(item) > self.most else 0.0

    def take(self, item: Any, now: float) -> float:
        likely = self._likely(item)
        self._committed += likely
        return likely

    def settle(self, permit: float, value: Any, now: float) -> None:
        self._committed -= permit

    def _likely(self, request: Request) -> float:
        given, told = self._client.likely_ids(request)
        return (given * self.price[0] + told * self.price[1]) / 1e6

    def _of(self, usage: Mapping[str, Any]) -> float:
        given, told = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        return float(given * self.price[0] + told * self.price[1]) / 1e6
