"""What an attempt that failed comes to: one table, from which both what is done and docs/verdicts.md are made.

No connection is opened here, so that the errors of every HTTP library are judged alike.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from millstream.llm.said import Said

PATIENCE = 64
"""So many requests in a row that a server left without a reply end a run."""

_PROMPT = 32  # of prompts that are refused for what they hold, before anything was answered: then it is a setting
_UNSURE = 4  # refusals that name neither the prompt nor a setting: the first prompts may be odd ones, all four hardly
_LATER = 8  # 401, 403 and 404 in a row, when there were replies before: a proxy may say so of one request

_WRONG_URL = "check the base URL: it mostly ends in /v1"
_WRONG_PROXY = "check the proxy's login (--proxy, HTTPS_PROXY, HTTP_PROXY)"
_NO_MONEY = "the account has no quota left"
_TOO_LONG = "the prompt is too long for this server"


@dataclass(frozen=True)
class Verdict:
    """One line of the table. The first one that fits an error is taken.

    `then` is what becomes of the request:
    reply  it is answered
    own    a fault of this request: no other attempt
    again  another attempt, up to the most
    busy   another attempt, which does not count while others get through
    away   another attempt; if nobody gets through, it is held until somebody does

    `first` and `later` are how many such faults in a row end a run, while nothing was answered yet and after that; with
    None they never do. It fits if the status is among `statuses` and, where they are given, one of `codes`, `words` or
    `params` is found, and `fits` agrees. `when` says it in words, `of` is what the docs say in place of the statuses.
    """

    kind: str
    then: Literal["reply", "own", "again", "busy", "away"]
    when: str = ""
    statuses: frozenset[int] = frozenset()
    codes: frozenset[str] = frozenset()
    words: re.Pattern[str] | None = None
    params: re.Pattern[str] | None = None
    fits: Callable[[Said, str, float | None], bool] = lambda said, url, seconds: True
    first: int | None = None
    later: int | None = None
    advice: str = ""
    of: str = ""

    @property
    def retry(self) -> bool:
        return self.then in ("again", "busy", "away")

    @property
    def servers(self) -> bool:
        """It is the server's doing, whatever the prompt: so many in a row end a run."""
        return self.later == PATIENCE

    def fit(self, status: int, said: Said, url: str, seconds: float | None) -> bool:
        if status not in self.statuses or not self.fits(said, url, seconds):
            return False
        told = self.codes or self.words or self.params
        return not told or bool(
            self.codes & said.codes
            or (self.words and self.words.search(said.message))
            or (self.params and self.params.match(said.param))
        )


def _any(*words: str) -> re.Pattern[str]:
    return re.compile("|".join(words), re.IGNORECASE)


def _of(*statuses: int) -> frozenset[int]:
    return frozenset(statuses)


def _asks(said: Said, url: str, seconds: float | None) -> bool:
    return seconds is not None


_REFUSALS = frozenset(range(400, 500))
_ERRORS = frozenset(range(500, 600))
_AGAIN: dict[str, Any] = {"first": 3, "later": PATIENCE}  # the first two prompts may be what a server fails on
_AWAY: dict[str, Any] = {"first": 2, "later": PATIENCE}

ANSWERED = (
    Verdict("reply", "reply", "text, also empty, also in parts", of="HTTP 200"),
    Verdict("reply", "reply", "tool calls, with or without text", of="HTTP 200"),
    Verdict("reply", "reply", "a refusal, which is the text", of="HTTP 200"),
    Verdict("reply", "reply", "text that `max_tokens` or a filter cut, and says so in `finish_reason`", of="HTTP 200"),
)
"""What is no failure; replies.py and events.py know it."""

HTTP = (
    Verdict(
        "quota",
        "own",
        "no money left",
        _of(400, 402, 403, 429),
        frozenset(
            {
                *("insufficient_quota", "billing_not_active", "exceeded_current_quota_error"),
                *("billing_hard_limit_reached", "insufficient_balance", "arrearage"),
            }
        ),
        _any(r"credit balance is too low"),
        first=1,
        later=1,
        advice=_NO_MONEY,
    ),
    Verdict(
        "quota",
        "own",
        "the words ask for fewer max_tokens",
        _of(402),
        words=_any(r"fewer max_tokens", r"can only afford"),
        first=3,
        later=3,
        advice=_NO_MONEY,
    ),
    Verdict("quota", "own", "", _of(402), first=1, later=3, advice=_NO_MONEY),
    Verdict(
        "unusable",
        "again",
        "the model wrote JSON, or called a tool, as it should not",
        _of(400),
        frozenset({"json_validate_failed", "tool_use_failed", "output_parse_failed"}),
        first=_PROMPT,
    ),
    Verdict(
        "too_large",
        "own",
        "the request's own size",
        _REFUSALS,
        frozenset(
            {
                *("context_length_exceeded", "string_above_max_length", "array_above_max_length"),
                *("request_too_large", "exceed_context_size_error"),
            }
        ),
        _any(
            *(
                r"\b(maximum|model's) context\b",
                r"\bcontext (length|window|limit|size)\b",
                r"\brequest (is )?too large\b",
            ),
            *(r"\b(prompt|input|request|message)s? (is|are) too (long|large)\b", r"\breduce (the length|your message)"),
            *(r"\blonger than the model\b", r"\bstring too long\b", r"\btoo many (input )?tokens\b"),
            *(r"\binput token count\b", r"`inputs` tokens"),
        ),
        first=_PROMPT,
        advice=_TOO_LONG,
        of="HTTP 4xx",
    ),
    Verdict("too_large", "own", "", _of(413), first=_PROMPT, advice=_TOO_LONG),
    Verdict(
        "filtered",
        "own",
        "a filter or moderation",
        _REFUSALS,
        frozenset(
            {
                *("content_filter", "content_policy_violation", "responsibleaipolicyviolation"),
                *("data_inspection_failed", "moderation_blocked", "input_moderation"),
            }
        ),
        _any(
            *(r"\bcontent (management )?polic(y|ies)\b", r"\bcontent[_ ]filter", r"\bflagged\b", r"\bmoderation\b"),
            r"\binappropriate content\b",
        ),
        first=_PROMPT,
        advice="a filter refused this prompt",
        of="HTTP 4xx",
    ),
    Verdict(
        "bad_request",
        "own",
        "the words name the prompt: its messages, images or tools",
        _of(400, 404, 415, 422),
        frozenset(
            {"invalid_prompt", "invalid_image", "invalid_image_url", "invalid_image_format", "image_parse_error"}
        ),
        _any(
            r"\b(not|that) support (image|vision|audio|video|file|tool|multimodal)",
            r"\bdo(es)? not support (image|vision|audio|video|file|tool)",
            *(r"\bat most \d+ image", r"\bmessages?[.\[]+\d+"),
        ),
        params=re.compile(r"(messages|prompt|input|contents?|query|documents|texts)\b"),
        first=_PROMPT,
    ),
    Verdict(
        "tls",
        "own",
        "the server wants TLS",
        _of(400),
        words=re.compile(r"\bHTTP request\b.*\bHTTPS\b", re.IGNORECASE),  # nginx and Go
        fits=lambda said, url, seconds: url.startswith("http:"),
        first=1,
        later=_LATER,
        advice="the server wants TLS; does its URL start with https://?",
    ),
    Verdict(
        "model_not_found",
        "own",
        "there is no such model",
        _of(400, 404),
        frozenset({"model_not_found"}),
        _any(r"\bmodel (does )?not exist\b", r"\b(not a valid|unknown) model\b"),
        first=1,
        later=_LATER,
        advice="check the model's name",
    ),
    Verdict(
        "model_not_found",
        "own",
        "an error about a model",
        _of(404),
        words=_any(r"\bmodel\b"),
        fits=lambda said, url, seconds: said.is_error,
        first=1,
        later=_LATER,
        advice="check the model's name",
    ),
    Verdict(
        "not_found",
        "own",
        "there is no such path",
        _of(404),
        fits=lambda said, url, seconds: not said.is_error or "unknown_url" in said.codes,
        first=1,
        later=_LATER,
        advice=_WRONG_URL,
    ),
    Verdict("refused", "own", "", _of(405), first=1, later=_LATER, advice=_WRONG_URL),
    Verdict("not_found", "own", "any other error", _of(404), first=_UNSURE, later=_LATER, advice=_WRONG_URL),
    Verdict("unauthorized", "own", "", _of(401), first=1, later=_LATER, advice="check the API key (OPENAI_API_KEY)"),
    Verdict("proxy", "own", "", _of(407), first=1, later=_LATER, advice=_WRONG_PROXY),
    Verdict(
        "rate_limited",
        "busy",
        "a code for too many requests",
        _of(400, 403),
        frozenset({"rate_limit_exceeded", "ratelimitexceeded", "userratelimitexceeded", "rate_limit_error"}),
        **_AWAY,
    ),
    Verdict(
        "forbidden",
        "own",
        "a page, as of a firewall",
        _of(403),
        fits=lambda said, url, seconds: said.is_page,
        first=_LATER,
        later=_LATER,
    ),
    Verdict("forbidden", "own", "any other error", _of(403), first=3, later=_LATER, advice="this key may not do that"),
    Verdict("rate_limited", "busy", "", _of(429, 498), **_AWAY),
    Verdict("server_error", "busy", "with Retry-After", _of(503), fits=_asks, **_AWAY),
    Verdict("server_error", "busy", "", _of(529), **_AWAY),
    Verdict(
        "server_error",
        "away",
        "what a proxy says of the server behind it",
        _of(502, 503, 504, *range(520, 528), 530),
        of="HTTP 502 to 504, 520 to 527, 530",
        **_AWAY,
    ),
    Verdict("server_error", "again", "any other error of the server", _ERRORS, of="HTTP 5xx", **_AGAIN),
    Verdict("server_timeout", "again", "", _of(408), **_AGAIN),
    Verdict("refused", "again", "", _of(409, 425), **_AGAIN),
    Verdict("bad_request", "own", "any other error", _of(400, 422), first=_UNSURE),
    Verdict("refused", "own", "any other error", _REFUSALS, first=_UNSURE, of="HTTP 4xx"),
    Verdict("refused", "own", "a redirect", frozenset(range(300, 400)), first=1, later=_LATER, of="HTTP 3xx"),
    Verdict("refused", "own", "any other status", frozenset(range(100, 1000)), first=_UNSURE, of="HTTP"),
)
"""What a server's errors come to, with an HTTP status of their own or inside a reply with status 200."""

CONNECTION = Verdict("connection", "away", "refused, reset, unknown host, closed too early", of="no reply", **_AWAY)
TLS = Verdict("tls", "own", "no trusted certificate; TLS where none is", of="no reply", first=1, later=_LATER)
NO_PLACE = Verdict("no_place", "busy", "no file descriptor is free (ulimit -n)", of="not sent")
PROXY = Verdict("proxy", "own", "a proxy that opens no tunnel", of="no reply", first=1, later=_LATER)
TIMEOUT = Verdict("timeout", "again", "an attempt over `--timeout`", of="no reply")
UNKNOWN = Verdict("error", "own", "an exception that nobody expected", of="no reply", first=PATIENCE, later=PATIENCE)
UNUSABLE = Verdict("unusable", "again", "no JSON, no choices, given up by the server", of="HTTP 200", **_AGAIN)
SPEECHLESS = Verdict("unusable", "again", "choices without text, refusal or tool calls", of="HTTP 200", first=_PROMPT)
CUT = Verdict("cut", "again", "a stream that ends too early", of="HTTP 200", **_AGAIN)
SCHEMA = Verdict("schema", "again", "text that does not fit `--schema`", of="HTTP 200")
NO_TEXT = Verdict(
    "length", "own", "no text, or no JSON for `--schema`, as max_tokens ended it", of="HTTP 200", first=_PROMPT
)
WITHHELD = Verdict(
    "content_filter", "own", "no text, or no JSON for `--schema`, as a filter ended it", of="HTTP 200", first=_PROMPT
)
ENDED_EARLY = {"length": (NO_TEXT, "max_tokens cut it; "), "content_filter": (WITHHELD, "a filter cut it; ")}
"""finish_reason -> what becomes of a text that does not fit, and words for it."""
TOO_LONG = Verdict("unusable", "own", "a reply over `--max-reply`", of="HTTP 200", first=_PROMPT)
LATE = Verdict("timeout", "own", "a request over its `--deadline`", of="any time")
UNSENT = Verdict("bad_request", "own", "a request that cannot be sent as JSON", of="not sent", first=_UNSURE)
BAD_ROW = Verdict("bad_row", "own", "a row that makes no request", of="not sent")
TWICE = Verdict("duplicate_id", "own", "a `custom_id` that was there before", of="not sent")

OTHERS = (
    *(UNUSABLE, SPEECHLESS, CUT, SCHEMA, NO_TEXT, WITHHELD, TOO_LONG, CONNECTION, TLS, PROXY, NO_PLACE),
    *(TIMEOUT, UNKNOWN, LATE, UNSENT, BAD_ROW, TWICE),
)
"""What everything else comes to."""


class WireError(Exception):
    """One attempt that failed, judged by `verdict`; `kind` is one word, `status` the HTTP status if there was one.

    `retry_after`: the seconds the server wants to be left alone; `usage`: what was paid for all the same, in the
    server's words; `unpaid`: nothing was, as it was not sent, or refused; `brief`: the message, where it is told beside
    others; `server`: the base URL it was sent to.
    """

    server = ""

    def __init__(
        self,
        verdict: Verdict,
        message: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        usage: dict[str, Any] | None = None,
        brief: str | None = None,
        unpaid: bool = False,
    ) -> None:
        super().__init__(message)
        self.verdict, self.status, self.retry_after = verdict, status, retry_after
        self.brief = brief or message
        self.usage: dict[str, Any] = usage or {}
        self.unpaid = unpaid or status not in (None, 200) or verdict.of == "not sent"

    @property
    def kind(self) -> str:
        return self.verdict.kind

    @property
    def no_place(self) -> bool:
        """It could not begin for want of something on this machine: no attempt was made."""
        return self.verdict is NO_PLACE

    @property
    def retry(self) -> bool:
        """Asking again makes sense."""
        return self.verdict.retry

    @property
    def fatal(self) -> bool:
        """If it comes first, every other request would fail likewise."""
        return self.verdict.first == 1


def verdict(status: int | None, said: Said, url: str, seconds: float | None = None) -> Verdict:
    """What an HTTP status comes to, with the words that came with it and the seconds that the server asks for.

    An error without one, inside a reply, is known by its codes, or is the server's.

    >>> verdict(400, Said("This model's maximum context length is 4096 tokens"), "").kind
    'too_large'
    """
    if status is None:
        found = next((line for line in HTTP if line.codes & said.codes), None)
        return found or verdict(500, said, url, seconds)
    return next(line for line in HTTP if line.fit(status, said, url, seconds))


def of_row(kind: str) -> Verdict:
    """The verdict on a row that made no request."""
    return next((line for line in (BAD_ROW, TWICE) if line.kind == kind), replace(BAD_ROW, kind=kind))


_THEN = {
    "reply": ("answered", "-"),
    "own": ("this prompt's fault", "-"),
    "again": ("asked again", "yes"),
    "busy": ("asked again", "only while nobody gets through"),
    "away": ("asked again; held while nobody gets through", "only while others get through"),
}


def as_markdown() -> Iterator[str]:
    """The table as docs/verdicts.md has it, line by line."""
    yield "| what came | kind | the request is | counts to `--attempts` | a run stops at |"
    yield "|---|---|---|---|---|"
    for line in (*ANSWERED, *HTTP, *OTHERS):
        then, counts = _THEN[line.then]
        yield f"| {_what(line)} | {line.kind} | {then} | {counts} | {_stops(line)} |"


def _what(line: Verdict) -> str:
    status = line.of or f"HTTP {', '.join(map(str, sorted(line.statuses)))}"
    codes = ", ".join(f"`{code}`" for code in sorted(line.codes))
    return ": ".join(filter(None, [status, "; ".join(filter(None, [line.when, codes]))]))


def _stops(line: Verdict) -> str:
    if line.first == line.later:
        return "-" if line.first is None else "once" if line.first == 1 else f"{line.first} in a row"
    first = "the first" if line.first == 1 else f"the first {line.first}"
    return f"{first}, if nothing was answered before{f'; else {line.later} in a row' if line.later else ''}"
