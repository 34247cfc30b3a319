"""Multipart uploads to S3 that a killed process has left: nobody sees them, and they cost what they hold."""

import contextlib
import errno
import hashlib
import hmac
import time
from collections.abc import Iterator
from urllib.parse import quote, urlencode, urlsplit
from xml.etree import ElementTree

from millstream.store.asking import fetched
from millstream.store.aws import region, server_of
from millstream.store.credentials import S3Keys, keys_of

_NOTHING = hashlib.sha256(b"").hexdigest()


def abort_uploads(bucket: str, prefix: str) -> int:
    """Abort all that are open below a prefix, or in a whole bucket those that are in no folder; how many.

    Raises OSError, and RequestError where whoever gives keys has none now.
    """
    keys = keys_of(f"s3://{bucket}")
    if keys is None:
        return 0  # nobody may do it who gives no name
    signed = keys.now()
    count = 0
    for name, upload in list(_uploads(signed, bucket, prefix)):
        if not prefix and "/" in name:
            continue  # other tools write to the bucket, too
        with contextlib.suppress(OSError):  # another one may just have done it
            _asked(signed, "DELETE", f"/{bucket}/{name}", {"uploadId": upload})
            count += 1
    return count


def _uploads(signed: S3Keys, bucket: str, prefix: str) -> Iterator[tuple[str, str]]:
    marks: dict[str, str] = {}
    while True:
        told = _parsed(_asked(signed, "GET", f"/{bucket}", {"uploads": "", "prefix": prefix, **marks}))
        space = told.tag.partition("}")[0] + "}" if told.tag.startswith("{") else ""
        for each in told.iter(f"{space}Upload"):
            yield each.findtext(f"{space}Key") or "", each.findtext(f"{space}UploadId") or ""
        if told.findtext(f"{space}IsTruncated") != "true":
            return
        marks = {
            "key-marker": told.findtext(f"{space}NextKeyMarker") or "",
            "upload-id-marker": told.findtext(f"{space}NextUploadIdMarker") or "",
        }


def _parsed(answer: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(answer)
    except ElementTree.ParseError as error:
        raise OSError(errno.EIO, f"the server's answer is no XML: {error}") from error


def _asked(signed: S3Keys, method: str, path: str, query: dict[str, str]) -> bytes:
    address, path = server_of("s3"), quote(path)
    told = urlencode(sorted(query.items()), quote_via=quote)
    headers = _signature(signed, method, urlsplit(address).netloc, path, told)
    return fetched(method, f"{address.rstrip('/')}{path}?{told}", headers=headers)


def _signature(signed: S3Keys, method: str, host: str, path: str, query: str) -> dict[str, str]:
    """The headers of a request without a body: Amazon's signature, version 4."""
    now = time.gmtime()
    day, moment = time.strftime("%Y%m%d", now), time.strftime("%Y%m%dT%H%M%SZ", now)
    headers = {"host": host, "x-amz-content-sha256": _NOTHING, "x-amz-date": moment}
    if signed.token:
        headers["x-amz-security-token"] = signed.token
    names = ";".join(headers)
    told = "".join(f"{name}:{value}\n" for name, value in headers.items())
    asked = "\n".join((method, path, query, told, names, _NOTHING))
    scope = f"{day}/{region()}/s3/aws4_request"
    text = "\n".join(("AWS4-HMAC-SHA256", moment, scope, hashlib.sha256(asked.encode()).hexdigest()))
    key = f"AWS4{signed.secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    seal = hmac.digest(key, text.encode(), "sha256").hex()
    given = f"AWS4-HMAC-SHA256 Credential={signed.access}/{scope}, SignedHeaders={names}, Signature={seal}"
    return {**headers, "authorization": given}
