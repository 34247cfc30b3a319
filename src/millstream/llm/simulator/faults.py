"""What can go wrong with a request to the simulator, and how one asks for it."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from millstream.errors import RequestError


class HttpError(NamedTuple):
    """An HTTP error as the simulator sends it: in OpenAI's form, or as the page of a proxy in front of the server.

    `late` errors are found out only after the server has worked on the request; the rest comes at once.
    """

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    late: bool = False
    page: bool = False


ERRORS = {
    # Try again later.
    "429": HttpError(429, "Rate limit reached; try again later.", "requests", "rate_limit_exceeded"),
    "500": HttpError(500, "The server had an error while processing your request.", "server_error", late=True),
    "503": HttpError(503, "The engine is overloaded; try again later.", "service_unavailable"),
    "529": HttpError(529, "Overloaded", "overloaded_error"),
    "408": HttpError(408, "Request timed out.", "timeout", late=True),
    # Every request would end like this.
    "400": HttpError(400, "The request is not valid."),
    "401": HttpError(401, "Incorrect API key provided.", code="invalid_api_key"),
    "403": HttpError(403, "You are not allowed to do this.", code="unsupported_country_region_territory"),
    "404-model": HttpError(404, "The model does not exist.", code="model_not_found"),
    "413": HttpError(413, "The request is too large.", code="request_too_large"),
    # There is no money.
    "quota": HttpError(429, "You exceeded your current quota.", "insufficient_quota", "insufficient_quota"),
    "billing": HttpError(429, "Your account is not active.", "billing_not_active", "billing_not_active"),
    "hard-limit": HttpError(400, "Billing hard limit has been reached.", code="billing_hard_limit_reached"),
    "credits": HttpError(402, "This request requires more credits, or fewer max_tokens.", "billing_error"),
    # This prompt is refused, and no other.
    "context-length": HttpError(
        400, "This model's maximum context length is 8192 tokens.", code="context_length_exceeded"
    ),
    "content-policy": HttpError(400, "The prompt triggered the content management policy.", code="content_filter"),
    "too-many-ids": HttpError(429, "Request too large for this model.", "tokens", "rate_limit_exceeded"),
    "no-route": HttpError(404, "No endpoints found that support image input.", "not_found"),
    "json-failed": HttpError(400, "Failed to generate JSON.", code="json_validate_failed", late=True),
    # What stands in front of the server answers in its place.
    "403-page": HttpError(403, "Attention Required! | Blocked", page=True),
    "502-page": HttpError(502, "502 Bad Gateway", page=True),
    "504-page": HttpError(504, "504 Gateway Time-out", late=True, page=True),
}

_NUMBERS = {  # kinds with a number: the one when none is given
    "429": 1.0,
    "503": None,
    "529": None,
    "slow-bytes": 0.05,
    "huge": 100.0,
}

BROKEN = (
    *("disconnect", "cut", "between", "hang", "slow-bytes", "garbage", "truncated-json", "html"),
    *("empty-choices", "null-content", "bad-schema", "error-event", "huge"),
)
"""Ways in which a reply is none, or hardly one:

disconnect      the connection closes before the first byte of the reply
cut             it closes in the middle of the body, of a stream without ``[DONE]``
between         the reply is fine, but the connection closes on the next request that comes over it, without a byte
hang            no answer until the client goes away
slow-bytes      the body comes in 16 pieces, a stream piece by piece, with NUMBER seconds between two
garbage         200 with bytes that are no UTF-8
truncated-json  200 with half of the JSON, in a body that is whole for HTTP
html            200 with an HTML page
empty-choices   200 with an empty list of choices
null-content    200 with null in place of the text
bad-schema      200 with a text that fits no JSON schema of an object
error-event     an error in mid stream, then ``[DONE]``; requests without a stream are spared
huge            200 with a body of NUMBER MiB
"""

ENDED = ("length", "filtered", "half-filtered", "refused", "tool-calls", "all-thought", "aborted")
"""Ways in which a reply ends otherwise than with all of its text:

length         half of the text, finish_reason "length"
filtered       null, finish_reason "content_filter"; half-filtered: the same after half of the text
refused        a refusal beside null
tool-calls     a call of a tool beside null
all-thought    null, finish_reason "length": all of its ids went into thinking
aborted        half of the text, finish_reason "abort", as servers send it that were shut down
"""

COUNTED = ("no-usage", "other-usage", "hidden-thinking", "cached")
"""Ways in which a reply tells what it cost, though it is paid for as ever:

no-usage         `usage` is null
other-usage      it says `input_tokens` and `output_tokens`
hidden-thinking  half of the reply's ids are thoughts that `total_tokens` counts, and `completion_tokens` does not
cached           half of the prompt's ids were read from a cache
"""

KINDS = (*ERRORS, *BROKEN, *ENDED, *COUNTED)


@dataclass(frozen=True, slots=True)
class FaultRate:
    """One kind of fault and how often it comes; see `parse_fault`.

    `number` is Retry-After in seconds for 429, 503 and 529 (None: no such header), the pause between two pieces for
    slow-bytes, the size in MiB for huge. `times` limits it to the first that many requests of each body (None: no
    limit).
    """

    kind: str
    probability: float
    number: float | None = None
    times: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError(f"no fault is called {self.kind!r}; there are: {', '.join(KINDS)}")
        if not 0 <= self.probability <= 1:
            raise RequestError(f"fault {self.kind}: the probability is {self.probability:g}, not within 0 and 1")
        if self.number is not None and self.kind not in _NUMBERS:
            raise RequestError(f"fault {self.kind} takes no number; these do: {', '.join(_NUMBERS)}")
        if self.number is not None and not 0 <= self.number < math.inf:
            raise RequestError(f"fault {self.kind}: {self.number:g} is not from 0")
        if self.times is not None and self.times < 1:
            raise RequestError(f"fault {self.kind}: times must be 1 or more")


def parse_fault(text: str) -> FaultRate:
    """A fault from ``KIND:PROBABILITY[:NUMBER][:times=N]``.

    >>> parse_fault("429:0.05:2")
    FaultRate(kind='429', probability=0.05, number=2.0, times=None)
    >>> parse_fault("503:1.0:times=2")  # the first two requests of each body fail, then it works
    FaultRate(kind='503', probability=1.0, number=None, times=2)
    >>> parse_fault("429:0.05").number, parse_fault("429:0.05:none").number  # without a Retry-After
    (1.0, None)
    """
    kind, *rest = text.strip().split(":")
    times = int(rest.pop()[6:]) if rest and rest[-1].startswith("times=") and rest[-1][6:].isdecimal() else None
    try:
        probability = float(rest[0])
        number = _NUMBERS.get(kind) if len(rest) == 1 else None if rest[1] == "none" else float(rest[1])
        if len(rest) > 2:
            raise ValueError
    except (ValueError, IndexError):
        raise RequestError(f"a fault is KIND:PROBABILITY[:NUMBER][:times=N], not {text!r}") from None
    return FaultRate(kind, probability, number, times)
