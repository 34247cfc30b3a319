"""OpenAI's Batch format: lines that ask and lines that answer, as rows (mappings) without any reading or writing.

Whoever writes answers agrees on successes, not on failures: OpenAI puts an HTTP error into the response's body and
leaves `error` null, vLLM leaves the body out and puts text or an object into `error`. Both are read; OpenAI's shape is
what we write.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

CHAT = "/chat/completions"
"""The path of a request unless told otherwise."""

LONGEST_ID = 64
"""Characters of a custom_id that every server is known to take."""

MISSING = "missing"
"""The code of a request that has no outcome."""


class BatchRequest(NamedTuple):
    """One line of a request file; `path` follows the base URL, as in "/chat/completions"."""

    custom_id: str
    path: str
    body: dict[str, Any]


class BatchOutcome(NamedTuple):
    """What one line of an output file says. Where `ok` is true, `code` and `message` are None."""

    custom_id: str
    ok: bool
    code: str | None = None
    message: str | None = None


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object of one line. Raises ValueError that says what is wrong.

    >>> parse_line(b'{"custom_id": "a"}')
    {'custom_id': 'a'}
    """
    try:
        row = msgspec.json.decode(line)
    except (ValueError, RecursionError):
        # The standard library's reader is slower but takes NaN, and its message says where the error is.
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"not valid UTF-8: {error.reason} at byte {error.start} of the line") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON: {error.msg}, at character {error.pos + 1} of the line") from None
        except (ValueError, RecursionError) as error:  # integers of over 4,300 digits, values nested too deep
            raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but {type(row).__name__}")
    return row


def render_line(row: Mapping[str, Any]) -> bytes:
    """A row as one line of JSON, its line end included.

    >>> render_line({"custom_id": "a"})
    b'{"custom_id":"a"}\\n'
    """
    try:
        return msgspec.json.encode(row) + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which has to stay escaped
        return json.dumps(row).encode() + b"\n"


# Requests -----------------------------------------------------------------------------------------------------------


def is_request(row: Mapping[str, Any]) -> bool:
    """Whether a row looks like a line of a request file.

    >>> is_request({"custom_id": "a", "url": "/v1/completions", "body": {}}), is_request({"prompt": "a"})
    (True, False)
    """
    return "body" in row and "custom_id" in row and ("url" in row or "method" in row)


def parse_request(row: Mapping[str, Any]) -> BatchRequest:
    """The request in a row, for any path. Raises ValueError that says what is missing or wrong.

    >>> parse_request({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m"}})
    BatchRequest(custom_id='a', path='/completions', body={'model': 'm'})
    >>> parse_request({"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {}})
    Traceback (most recent call last):
    ValueError: 'method' is 'GET'; a batch takes POST only
    """
    custom_id = _custom_id(row)
    method, url, body = (_given(row, name) for name in ("method", "url", "body"))
    if method != "POST":
        raise ValueError(f"'method' is {method!r:.40}; a batch takes POST only")
    if not isinstance(url, str) or not url.startswith("/"):
        raise ValueError(f"'url' is {url!r:.80}; it is a path such as '/v1{CHAT}'")
    path = url.removeprefix("/v1") if url.startswith("/v1/") else url
    if not isinstance(body, dict):
        raise ValueError(f"'body' is not an object but {type(body).__name__}")
    if body.get("stream"):
        raise ValueError("'stream' is set in 'body'; a batch cannot be streamed")
    return BatchRequest(custom_id, path, body)


def request_row(custom_id: str, body: Mapping[str, Any], path: str = CHAT) -> dict[str, Any]:
    """A row that asks. Raises ValueError for a custom_id that is empty or over `LONGEST_ID` characters.

    >>> request_row("a", {"model": "m", "prompt": "hi"}, "/completions")
    {'custom_id': 'a', 'method': 'POST', 'url': '/v1/completions', 'body': {'model': 'm', 'prompt': 'hi'}}
    """
    if not 0 < len(custom_id) <= LONGEST_ID:
        raise ValueError(f"a custom_id has 1 to {LONGEST_ID} characters, and {custom_id!r:.80} has {len(custom_id)}")
    return {"custom_id": custom_id, "method": "POST", "url": f"/v1{path}", "body": dict(body)}


def _given(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise ValueError(f"{name!r} is missing; there are {', '.join(map(repr, row)) or 'none':.200}")
    return row[name]


def _custom_id(row: Mapping[str, Any]) -> str:
    custom_id = _given(row, "custom_id")
    if not isinstance(custom_id, str):
        raise ValueError(f"'custom_id' is not text but {type(custom_id).__name__}")
    if not custom_id:
        raise ValueError("'custom_id' is empty")
    try:
        custom_id.encode()
    except UnicodeEncodeError:
        raise ValueError("'custom_id' has half of a surrogate pair") from None
    return custom_id


# Outcomes -----------------------------------------------------------------------------------------------------------


def output_row(
    custom_id: str,
    *,
    name: str,
    body: Any = None,
    status: int = 200,
    request_id: str | None = None,
    error: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A row that answers; `name` is its own id, as in "batch_req_7", and the request's too where that has none.

    A reply, or an error that came over HTTP, has `body`, or else a `status` that is not 200 and `error` for the body. A
    request that got no response (timeout, connection, cancelled) has `error` with code and message alone. Raises
    ValueError if there is neither.

    >>> output_row("a", name="batch_req_1", body={"choices": []}, request_id="r")["response"]
    {'status_code': 200, 'request_id': 'r', 'body': {'choices': []}}
    >>> output_row("a", name="batch_req_1", status=400, error={"code": "bad", "message": "no"})["response"]
    {'status_code': 400, 'request_id': 'batch_req_1', 'body': {'error': {'code': 'bad', 'message': 'no'}}}
    >>> output_row("a", name="batch_req_1", error={"code": "timeout", "message": "after 5 s"})
    {'id': 'batch_req_1', 'custom_id': 'a', 'response': None, 'error': {'code': 'timeout', 'message': 'after 5 s'}}
    """
    if body is None and status != 200:
        body, error = {"error": dict(error or {})}, None
    if body is not None:
        response = {"status_code": status, "request_id": request_id or name, "body": body}
        return {"id": name, "custom_id": custom_id, "response": response, "error": None}
    if error is None:
        raise ValueError("an output row has a body or an error")
    shown = {"code": error.get("code"), "message": error.get("message")}
    return {"id": name, "custom_id": custom_id, "response": None, "error": shown}


def read_outcome(row: Mapping[str, Any]) -> BatchOutcome:
    """What a row of any producer says. Raises ValueError only if it has no custom_id.

    It is ok if `error` is null, there is a response with status 200, and its body is an array, or an object without an
    error.

    >>> read_outcome({"custom_id": "a", "response": {"status_code": 200, "body": {"choices": []}}, "error": None})
    BatchOutcome(custom_id='a', ok=True, code=None, message=None)
    >>> read_outcome({"custom_id": "a", "response": {"status_code": 400}, "error": "too long"})
    BatchOutcome(custom_id='a', ok=False, code='http_400', message='too long')
    >>> read_outcome({"custom_id": "a"}).code
    'no_response'
    """
    custom_id = _custom_id(row)
    status, error = _failure(row)
    if error is None:
        return BatchOutcome(custom_id, True)
    code, message = _words(error)
    return BatchOutcome(custom_id, False, code or (f"http_{status}" if status else "error"), message)


def failure_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A failure of any producer in the one shape that we write. Raises ValueError if there is no custom_id.

    >>> failure_row({"id": "vllm-1", "custom_id": "a", "response": {"status_code": 400}, "error": "too long"})
    ... # doctest: +NORMALIZE_WHITESPACE
    {'id': 'vllm-1', 'custom_id': 'a', 'response': {'status_code': 400, 'request_id': 'vllm-1',
     'body': {'error': {'code': 'http_400', 'message': 'too long'}}}, 'error': None}
    """
    custom_id, _, code, message = read_outcome(row)
    name, response = _text(row.get("id")) or f"batch_req_{custom_id}", row.get("response")
    status, error = _failure(row)
    inner = _innermost(error)
    if not status:
        return output_row(custom_id, name=name, error={"code": code, "message": message})
    told = dict(inner) if isinstance(inner, Mapping) and inner else {"code": code, "message": message}
    request_id = _text(response.get("request_id")) if isinstance(response, Mapping) else None
    return output_row(custom_id, name=name, status=status, request_id=request_id, error=told)


def _failure(row: Mapping[str, Any]) -> tuple[int | None, Any]:
    """(HTTP status of a refusal, error) of a row; the error is None where it is a reply."""
    response, error = row.get("response"), row.get("error")
    if not isinstance(response, Mapping):
        return None, {"code": "no_response", "message": "there is no response"} if error is None else error
    status, body = response.get("status_code"), response.get("body")
    refused = status if type(status) is int and status != 200 else None
    if error is None and isinstance(body, Mapping):
        error = body.get("error")
    if error is not None:
        return refused, error
    if refused:
        return refused, body if isinstance(body, str) and body else {"message": f"HTTP {status}"}
    if status != 200:
        return None, {"code": "no_status", "message": "the response has no HTTP status"}
    if not isinstance(body, Mapping | list):
        return None, {"code": "no_body", "message": "the response has no body"}
    return None, None


def _innermost(error: Any) -> Any:
    """The error itself where it is wrapped, as in {"error": {"message": ...}}."""
    while isinstance(error, Mapping) and error.get("error") is not None:
        error = error["error"]
    return error


def _words(error: Any) -> tuple[str | None, str]:
    """(code, message) of an error in any shape."""
    error = _innermost(error)
    if not isinstance(error, Mapping):
        return None, str(error) or "no message"
    code = _text(error.get("code")) or _text(error.get("type"))
    return code, _text(error.get("message")) or code or json.dumps(error, default=str)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
