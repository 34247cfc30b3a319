"""What an ask run is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from millstream.client.checks import check_options


@dataclass(frozen=True)
class AskSettings:
    """What an ask run is asked for: `model`, `system`, `template`, `params`, `schema` make the requests.

    `timeout` bounds one attempt and `deadline` a request with all its retries, in seconds; None: no bound. `price` is
    that of a million ids in prompts, in replies and, if a third number is given, in prompts where they were cached; no
    attempt starts that could bring the cost, earlier runs' included, above `max_cost`. `keep_input` puts the row's own
    fields beside the answer. `max_reply` is the most bytes that are read of a reply. A server that asks to be left
    alone for longer than `longest_wait` seconds is, while anything else is left to ask; then the run stops. `overwrite`
    replaces an output that belongs to no journal of ours.

    `row_params` names the fields of plain rows that are sent as parameters. `retry_finish` asks replies again that
    ended so ("length", "content_filter", "refusal"), with other limits of ids in `params` if they are given. `reuse`
    takes the answers of a run that gave properties in another order. `keep_body` keeps the server's whole reply.
    `all_replies` sends standard output those, too, that are not whole.
    """

    model: str | None = None
    system: str | None = None
    template: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    schema: Any = None  # a JSON schema, or a pydantic model
    base_urls: Sequence[str] = field(default=(), repr=False)  # as keys, logins and headers, they may hold secrets
    api_key: str | None = field(default=None, repr=False)
    in_flight: int | Literal["auto"] = 64
    timeout: float | None = 600.0
    deadline: float | None = None
    attempts: int = 5
    longest_wait: float = 600.0
    rpm: float | None = None
    tpm: float | None = None
    hedge: bool = False
    ordered: bool = False
    limit: int | None = None
    price: Sequence[float] | None = None
    max_cost: float | None = None
    retry_faults: bool = False
    batch_format: bool = False
    keep_input: bool = False
    row_params: Sequence[str] = ()
    reuse: bool = False
    retry_finish: Sequence[str] = ()
    keep_body: bool = False
    all_replies: bool = False
    max_reply: int = 64 << 20
    overwrite: bool = False
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    proxy: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_options({each.name: getattr(self, each.name) for each in fields(self)})
