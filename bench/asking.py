"""The table's rows for asking: each function measures a few of them and returns them; no number is known before."""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench.asking_contenders import (
    AskPlan,
    Pair,
    aiohttp_orjson,
    answered,
    asked,
    client_api,
    command_line,
    fast_server,
    forget,
    openai_sdk,
    paired,
    resumed,
    seen_by,
    simulator,
    written,
    written_batch,
)
from bench.contenders import alternate, say
from bench.measure import Failed
from bench.rows import Row, could_not, spread

LATENCY = 0.05
"""Seconds in which the server answers, where speed is measured."""
REQUESTS = {64: (10_000, 5_000), 512: (20_000, 5_000)}
"""In flight -> requests n (n and 2n are run), and those of the openai package, which takes longer."""
TARGET_SPEED = {64: 4, 512: 12}
TARGET_CPU = 1.4

MILLION_IN_FLIGHT = 512
TARGET_MEMORY = 150_000_000
FLAT = 0.05
"""Memory counts as flat if it is up to this much higher at the end than after a tenth."""

CROWD = (500, 2_000)
CROWD_LATENCY = 0.5
CROWD_REQUESTS = 20_000
TARGET_CROWD = 1.1

BIMODAL = "bimodal 0.05 1.0 0.02"
HEDGE_IN_FLIGHT = 32
HEDGE_REQUESTS = 5_000
TARGET_TAIL = 5
TARGET_EXTRA = 0.05

CAPACITY = 100
LOGNORMAL = (0.2, 0.5)
FIXED = (16, 32, 64, 128, 256)
AUTO_REQUESTS = 12_000
TARGET_AUTO = 0.90
TARGET_REFUSED = 0.02

TARGET_RESUME, TARGET_RESUME_BATCH = 3.0, 5.0


def measured_rows(plan: AskPlan) -> list[Row]:
    """All wanted rows, in the table's order."""
    rows = list[Row]()
    for in_flight in REQUESTS:
        if f"speed-{in_flight}" in plan.wanted:
            rows += speed_rows(plan, in_flight)
    if "million" in plan.wanted:
        rows.append(million_row(plan))
    if "crowd" in plan.wanted:
        rows.append(crowd_row(plan))
    if "hedge" in plan.wanted:
        rows.append(hedge_row(plan))
    if "auto" in plan.wanted:
        rows += [auto_row(plan, overload) for overload in ("429", "queue")]
    if "resume" in plan.wanted:
        rows.append(resume_row(plan, "answers", written, TARGET_RESUME))
    if "resume-batch" in plan.wanted:
        rows.append(resume_row(plan, "answers to Batch rows", written_batch, TARGET_RESUME_BATCH))
    return rows


# --- speed


def speed_rows(plan: AskPlan, in_flight: int) -> list[Row]:
    """Requests a second beside the openai package's, and CPU time beside that of bare aiohttp, in the same rounds."""
    count, fewer = map(plan.requests, REQUESTS[in_flight])
    with fast_server(LATENCY) as url:
        pairs = alternate(
            {
                "millstream ask": partial(paired, command_line(plan), url, count, in_flight),
                "Client": partial(paired, client_api(plan), url, count, in_flight),
                "aiohttp": partial(paired, aiohttp_orjson(plan), url, count, in_flight),
                "openai": partial(paired, openai_sdk(plan), url, fewer, in_flight),
            },
            plan.long_repeats,
        )
    return [rate_row(plan, in_flight, pairs), cpu_row(plan, in_flight, pairs)]


def rate_row(plan: AskPlan, in_flight: int, pairs: dict[str, list[Pair] | Failed]) -> Row:
    what = (
        f"Requests per second at {in_flight} in flight over those of the openai package; the server answers after "
        f"{1000 * LATENCY:.0f} ms, so {in_flight / LATENCY:,.0f} is the most there can be"
    )
    target = f"at least {TARGET_SPEED[in_flight]} times"
    failure = first_failure(pairs)
    if failure:
        return Row(what, target, could_not(failure), plan.judged(False))
    rates = {name: [pair.more.rate for pair in all_of(done)] for name, done in pairs.items()}
    ours, api, theirs = (rates[name] for name in ("millstream ask", "Client", "openai"))
    ratios = ratio(ours, theirs)
    numbers = ", ".join(f"{name} {spread(found)}" for name, found in rates.items())
    measured = f"{spread(ratios, 1, ' times')}, as Client {spread(ratio(api, theirs), 1, ' times')}; {numbers}"
    return Row(what, target, measured, plan.judged(median(ratios) >= TARGET_SPEED[in_flight]))


def cpu_row(plan: AskPlan, in_flight: int, pairs: dict[str, list[Pair] | Failed]) -> Row:
    what = (
        f"CPU time of a request at {in_flight} in flight, journal and all, over that of bare aiohttp with orjson; "
        "the whole process, start included"
    )
    target = f"at most {TARGET_CPU} times"
    failure = first_failure(pairs)
    if failure:
        return Row(what, target, could_not(failure), plan.judged(False))
    each = {name: [pair.more.each for pair in all_of(done)] for name, done in pairs.items()}
    further = {name: [pair.further for pair in all_of(done)] for name, done in pairs.items()}
    ratios = ratio(each["millstream ask"], each["aiohttp"])
    without_start = ratio(further["millstream ask"], further["aiohttp"])
    as_client = ratio(each["Client"], each["aiohttp"])
    numbers = ", ".join(f"{name} {micros(each[name])} ({micros(further[name])})" for name in pairs)
    measured = (
        f"{spread(ratios, 2, ' times')}, without the start {spread(without_start, 2, ' times')}, "
        f"as Client {spread(as_client, 2, ' times')}; µs a request (without the start): {numbers}"
    )
    return Row(what, target, measured, plan.judged(median(ratios) <= TARGET_CPU))


# --- memory


def million_row(plan: AskPlan) -> Row:
    """Prompts from a generator, and what the process's memory does meanwhile."""
    what = (
        f"Memory over {plan.prompts:,} prompts from a generator, `Client.as_completed` with {MILLION_IN_FLIGHT} in "
        "flight, a server that answers at once"
    )
    target = f"less than {TARGET_MEMORY / 1e6:.0f} MB, and flat"
    say(f"{plan.prompts:,} prompts")
    try:
        with fast_server(0.0) as url:
            done = client_api(plan)(url, plan.prompts, MILLION_IN_FLIGHT)
    except Failed as failure:
        return Row(what, target, could_not(failure), plan.judged(False))
    resident, peak = done.told["resident"], done.told["peak"]
    growth = resident[-1] / resident[0] - 1 if resident[0] else math.nan
    measured = (
        f"at most {peak / 1e6:.0f} MB; {', '.join(f'{size / 1e6:.1f}' for size in resident)} MB after 10, 50 and 100 % "
        f"({100 * growth:+.1f} %); {done.wall:,.0f} s, {done.rate:,.0f} requests per second"
    )
    return Row(what, target, measured, plan.judged(peak < TARGET_MEMORY and growth <= FLAT))


# --- many in flight


def crowd_row(plan: AskPlan) -> Row:
    few, many = CROWD
    what = (
        f"CPU time of a request with {many:,} in flight over that with {few:,}, `millstream ask`, the server answers "
        f"after {CROWD_LATENCY} s; start and connecting included"
    )
    target = f"at most {TARGET_CROWD} times"
    count = plan.requests(CROWD_REQUESTS)
    with fast_server(CROWD_LATENCY) as url:
        pairs = alternate(
            {f"{number:,} in flight": partial(paired, command_line(plan), url, count, number) for number in CROWD},
            plan.long_repeats,
        )
    failure = first_failure(pairs)
    if failure:
        return Row(what, target, could_not(failure), plan.judged(False))
    less, more = map(all_of, pairs.values())
    ratios = ratio([pair.more.each for pair in more], [pair.more.each for pair in less])
    further = ratio([pair.further for pair in more], [pair.further for pair in less])
    measured = (
        f"{spread(ratios, 2, ' times')}, without start and connecting {spread(further, 2, ' times')}; "
        + " and ".join(
            f"{micros([pair.more.each for pair in done])} µs at {spread([pair.more.rate for pair in done])} a second"
            for done in (less, more)
        )
    )
    return Row(what, target, measured, plan.judged(median(ratios) <= TARGET_CROWD))


# --- hedging


def hedge_row(plan: AskPlan) -> Row:
    what = (
        f"p99 of the latency without hedging over that with `--hedge`, one request in 50 is 20 times slower "
        f"(`{BIMODAL}`), {HEDGE_IN_FLIGHT} in flight"
    )
    target = f"at least {TARGET_TAIL} times, for at most {100 * TARGET_EXTRA:.0f} % more requests"
    count = plan.requests(HEDGE_REQUESTS)
    found = alternate(
        {"alone": partial(tail, plan, count), "hedged": partial(tail, plan, count, "--hedge")}, plan.long_repeats
    )
    failure = first_failure(found)
    if failure:
        return Row(what, target, could_not(failure), plan.judged(False))
    alone, hedged = map(all_of, found.values())
    tails = [p99 for p99, _ in alone], [p99 for p99, _ in hedged]
    gains = ratio(*tails)
    extra = [share for _, share in hedged]
    measured = (
        f"{spread(gains, 1, ' times')}: {spread(tails[0], 2)} s and {spread(tails[1], 2)} s, for "
        f"{spread([100 * share for share in extra], 1, ' %')} more requests"
    )
    return Row(what, target, measured, plan.judged(median(gains) >= TARGET_TAIL and max(extra) <= TARGET_EXTRA))


def tail(plan: AskPlan, count: int, *options: str) -> tuple[float, float]:
    """The 99th percentile of the latency, and what share of requests the server saw beyond one a prompt."""
    with simulator("--latency", BIMODAL) as url:
        try:
            asked(plan, url, count, HEDGE_IN_FLIGHT, *options)
            latencies = sorted(latencies_in(plan.out))
        finally:
            forget(plan)
        seen = seen_by(url, "/_simulator/stats")
    return latencies[math.ceil(0.99 * count) - 1], seen["requests"] / count - 1


def latencies_in(out: Path) -> list[float]:
    with open(out, "rb") as file:
        return [json.loads(line)["latency_s"] for line in file]


# --- finding the number in flight


def auto_row(plan: AskPlan, overload: str) -> Row:
    """Replies a second with `--in-flight auto` and with each fixed number, on a server that does not tell its limit."""
    turned = "answers 429 beyond it" if overload == "429" else "lets the rest wait"
    middle, _ = LOGNORMAL
    what = (
        f"Replies per second with `--in-flight auto` over the best of {', '.join(map(str, FIXED))}: the server takes "
        f"{CAPACITY} at once and {turned}, latencies lognormal around {middle} s"
    )
    target = f"at least {100 * TARGET_AUTO:.0f} %" + (
        f", under {100 * TARGET_REFUSED:.0f} % of requests refused" if overload == "429" else ""
    )
    count = plan.requests(AUTO_REQUESTS)
    settings: dict[str, Any] = {"auto": partial(found_out, plan, overload, count, "auto")}
    for number in FIXED:
        # With fewer in flight fewer are asked, in about the same time: their rate is known as well.
        settings[str(number)] = partial(
            found_out, plan, overload, round(count * min(number, CAPACITY) / CAPACITY), number
        )
    found = alternate(settings, min(plan.repeats, 2))
    auto = found.pop("auto")
    able = {name: done for name, done in found.items() if isinstance(done, list)}
    failure = auto if isinstance(auto, Failed) else first_failure(found) if not able else None
    if failure:
        return Row(what, target, could_not(failure), plan.judged(False))
    best = max(able, key=lambda name: median(rate for rate, _ in able[name]))
    shares = ratio([rate for rate, _ in auto], [rate for rate, _ in able[best]])
    refused = [share for _, share in auto]
    others = ", ".join(
        f"{name}: {spread([rate for rate, _ in done])} ({spread([100 * share for _, share in done], 1, ' %')} refused)"
        for name, done in able.items()
    )
    measured = (
        f"{spread([100 * share for share in shares], unit=' %')} of that with {best}, "
        f"{spread([100 * share for share in refused], 2, ' %')} refused; auto: "
        f"{spread([rate for rate, _ in auto])} a second; {others}"
    )
    met = median(shares) >= TARGET_AUTO and max(refused) < TARGET_REFUSED
    return Row(what, target, measured, plan.judged(met))


def found_out(plan: AskPlan, overload: str, count: int, in_flight: int | str) -> tuple[float, float]:
    """Replies a second, and the share of requests that were answered 429."""
    latency = "lognormal " + " ".join(map(str, LOGNORMAL))
    with simulator("--latency", latency, "--capacity", str(CAPACITY), "--overload", overload) as url:
        try:
            done = asked(plan, url, count, in_flight)
        finally:
            forget(plan)
        seen = seen_by(url, "/_simulator/stats")
    return done.told["replies"] / done.wall, seen["statuses"].get("429", 0) / seen["requests"]


# --- going on


def resume_row(plan: AskPlan, what_of: str, write: Callable[[AskPlan, int], Path], most: float) -> Row:
    what = (
        f"Going on after {plan.prompts:,} {what_of}: from the start of the command to the first new request, the "
        "last of the prompts; and the most memory"
    )
    target = f"less than {most:.0f} s and {TARGET_MEMORY / 1e6:.0f} MB"
    say(f"a journal of {plan.prompts:,} {what_of}")
    try:
        prompts = answered(plan, plan.prompts, write)
        runs = alternate({"going on": partial(resumed, plan, prompts, plan.prompts)}, plan.long_repeats)["going on"]
    except Failed as failure:
        runs = failure
    finally:
        forget(plan)
    if isinstance(runs, Failed):
        return Row(what, target, could_not(runs), plan.judged(False))
    seconds, peaks = [run.seconds for run in runs], [run.peak for run in runs]
    measured = f"{spread(seconds, 1, ' s')}, {spread([peak / 1e6 for peak in peaks], unit=' MB')}"
    return Row(what, target, measured, plan.judged(median(seconds) < most and max(peaks) < TARGET_MEMORY))


# --- words and numbers


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Round by round."""
    return [mine / its for mine, its in zip(ours, theirs, strict=True)]


def micros(seconds: Sequence[float]) -> str:
    """The median, in microseconds.

    >>> micros([0.000123, 0.000125, 0.000129])
    '125'
    """
    return f"{1e6 * median(seconds):,.0f}"


def all_of(done: "list[Any] | Failed") -> list[Any]:
    assert isinstance(done, list)
    return done


def first_failure(found: dict[str, Any]) -> Failed | None:
    return next((done for done in found.values() if isinstance(done, Failed)), None)
