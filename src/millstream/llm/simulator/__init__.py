"""A small OpenAI-compatible server for dry runs, tests and benchmarks, with seeded latencies and faults.

A reply depends on the request's body and the seed alone. How a request is treated (latency, fault) depends on these and
on how many times that body came before, so that the same requests are treated alike in any order, at any concurrency.
All time is the event loop's, so that it runs under a virtual clock as well.

    async with running(Behaviour(latency=parse_latency("lognormal 0.8 0.5"))) as server:
        ...  # ask server.url, look at server.stats
"""

from millstream.llm.simulator.behaviour import Behaviour, Latency, parse_latency
from millstream.llm.simulator.faults import KINDS, FaultRate, parse_fault
from millstream.llm.simulator.server import Server, application, running, serve
from millstream.llm.simulator.stats import Stats

__all__ = [
    "KINDS",
    "Behaviour",
    "FaultRate",
    "Latency",
    "Server",
    "Stats",
    "application",
    "parse_fault",
    "parse_latency",
    "running",
    "serve",
]
