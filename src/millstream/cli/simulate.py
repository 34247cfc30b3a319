"""`simulate`: a server to try a job on."""

from typing import Any

import click

from millstream.cli.types import needs_ask_extra, numbers


@click.command(short_help="Run a small LLM server that misbehaves as told.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8089, show_default=True, help="0 takes a free one.")
@click.option(
    "--latency",
    default="fixed 0.05",
    show_default=True,
    metavar="FORM",
    help="fixed S, lognormal MEDIAN SIGMA, or bimodal FAST SLOW SHARE, in seconds.",
)
@click.option(
    "--piece-latency",
    default="fixed 0",
    show_default=True,
    metavar="FORM",
    help="The same between the pieces of a stream.",
)
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="KIND:PROBABILITY",
    help="Such as 429:0.05, 429:0.05:2 (Retry-After 2), 503:1:times=2, hang:0.01; docs/simulate.md lists the kinds;"
    " can be given again.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--reply-ids", type=int, metavar="N", help="Length of every reply in ids.")
@click.option("--capacity", type=int, metavar="N", help="Requests in service at once, hidden from the client.")
@click.option(
    "--overload",
    default="queue",
    show_default=True,
    type=click.Choice(["queue", "429"]),
    help="Beyond the capacity: wait, or 429.",
)
@click.option("--rpm", type=int, metavar="N", help="Requests a minute.")
@click.option("--tpm", type=int, metavar="N", help="Ids a minute.")
@click.option("--hide-limits", is_flag=True, help="No Retry-After with the 429s of these limits.")
@click.option("--quota", type=int, metavar="N", help="Ids to bill in all; then 429 with insufficient_quota.")
@click.option("--price", metavar="IN,OUT[,CACHED]", help="Of a million ids, so that the statistics tell the cost.")
@click.option("--require-key", "api_key", metavar="KEY", help="Answer 401 without this key.")
def simulate(
    host: str,
    port: int,
    latency: str,
    piece_latency: str,
    faults: tuple[str, ...],
    price: str | None,
    **options: Any,
) -> None:
    """Run an OpenAI-compatible server on this machine, to try a job on for free before it costs money.

    It answers chat and text completions, streamed too, and embeddings, with seeded latencies and faults: the same
    request is treated alike in any order. GET /_simulator/stats says what it saw and what that would have cost. Ctrl-C
    ends it.
    """
    from millstream.bridge import run

    with needs_ask_extra():
        from millstream.llm.simulator import Behaviour, parse_fault, parse_latency, serve
    behaviour = Behaviour(
        latency=parse_latency(latency),
        piece_latency=parse_latency(piece_latency),
        faults=tuple(parse_fault(fault) for fault in faults),
        price=numbers(price, "--price", "IN,OUT[,CACHED], such as 0.15,0.6"),
        **options,
    )
    run(serve(behaviour, host, port, lambda url: click.echo(f"listening on {url} (Ctrl-C ends it)")))
