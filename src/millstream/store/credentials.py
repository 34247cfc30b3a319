"""Keys for S3, from where Amazon's own tools have them, and renewed before they expire."""

import datetime
import importlib
import json
import os
import shlex
import subprocess
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit
from xml.etree import ElementTree

from millstream.errors import RequestError
from millstream.store.asking import Refused, fetched
from millstream.store.aws import named, profile, profile_name, region, server_of

_ELSEWHERE = ("role_arn", "sso_session", "sso_start_url", "login_session")
"""What says that a profile's keys come from a server that has to be asked in Amazon's own way."""
_CONTAINER, _METADATA = "http://169.254.170.2", "http://169.254.169.254"
_CONTAINERS = ("127.0.0.1", "localhost", "::1", "169.254.170.2", "169.254.170.23", "fd00:ec2::23")
"""Who may be sent a container's token without TLS."""
_EARLY = datetime.timedelta(minutes=5)
_SOON = 1.0  # seconds within which a machine of Amazon's answers
_A_WHILE = datetime.timedelta(minutes=10)
"""How long keys are used that somebody else renews."""


class S3Keys(NamedTuple):
    """What signs a request; `token` and `until` of those that expire."""

    access: str
    secret: str
    token: str | None = None
    until: datetime.datetime | None = None


class Renewed:
    """Keys that are asked for again before they expire; called, they are as obstore wants them."""

    def __init__(self, ask: Callable[[], S3Keys]) -> None:
        self._ask, self._last, self._lock = ask, ask(), threading.Lock()

    def now(self) -> S3Keys:
        with self._lock:
            until, now = self._last.until, datetime.datetime.now(datetime.UTC)
            if until and now > until - _EARLY:
                try:
                    self._last = self._ask()
                except (OSError, RequestError):
                    if now > until:  # until then there is time to try again
                        raise
            return self._last

    def __call__(self) -> dict[str, Any]:
        keys = self.now()
        told = {"access_key_id": keys.access, "secret_access_key": keys.secret, "token": keys.token}
        return told | {"expires_at": keys.until}


def keys_of(root: str) -> Renewed | None:
    """What signs requests to a bucket; None: nothing, as is wanted. Raises RequestError where no keys are found."""
    if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true"):
        return None
    found = _asked_for()
    if found is not None:
        return Renewed(found)
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true":
        with suppress(RequestError, OSError, ValueError):
            return Renewed(_of_machine)
    raise RequestError(
        f"found no credentials for {root}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a "
        "public bucket AWS_SKIP_SIGNATURE=true"
    )


def _asked_for() -> Callable[[], S3Keys] | None:
    """What gives the keys that the environment or a profile speaks of, in the order of Amazon's own tools."""
    told, name = profile(), profile_name()
    token_file = named("AWS_WEB_IDENTITY_TOKEN_FILE") or told.get("web_identity_token_file")
    role = named("AWS_ROLE_ARN") or told.get("role_arn")
    container = named("AWS_CONTAINER_CREDENTIALS_FULL_URI")
    if (rest := named("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")) is not None:
        container = f"{_CONTAINER}{rest}"
    if given := _given(os.environ, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        return given
    if token_file and role:
        return partial(_of_web_identity, token_file, role)
    if any(told.get(each) for each in _ELSEWHERE):
        return _of_botocore(name or "default")
    if given := _given(told, "aws_access_key_id", "aws_secret_access_key", "aws_session_token"):
        return given
    if command := told.get("credential_process"):
        return partial(_of_process, command)
    if name and not told:
        raise RequestError(f"there is no AWS profile {name} in ~/.aws: mend AWS_PROFILE")
    return partial(_of_container, container) if container else None


def _given(told: Mapping[str, str], *names: str) -> Callable[[], S3Keys] | None:
    access, secret, token = map(told.get, names)
    return partial(S3Keys, access, secret, token or None) if access and secret else None


def _of_web_identity(token_file: str, role: str) -> S3Keys:
    """What a role gives who has a token of somebody whom it trusts, as in Kubernetes."""
    asked = {"Action": "AssumeRoleWithWebIdentity", "Version": "2011-06-15", "RoleArn": role}
    asked["RoleSessionName"] = named("AWS_ROLE_SESSION_NAME") or "millstream"
    asked["WebIdentityToken"] = _token_in(token_file)
    server = server_of("sts")
    try:
        answer = ElementTree.fromstring(fetched("POST", server, urlencode(asked).encode()))
    except Refused as error:
        raise RequestError(
            f"{server} gives no keys for the role {role} ({error}): mend AWS_ROLE_ARN, or the token in {token_file}"
        ) from None
    except ElementTree.ParseError as error:
        raise RequestError(f"{server} gives no keys (its answer is no XML: {error}): mend its address") from None
    return _told(server, {each.tag.rpartition("}")[2]: each.text for each in answer.iter()}, "SessionToken")


def _token_in(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError as error:
        raise RequestError(f"{path}, with a token for credentials, cannot be read: {error.strerror}") from None


def _of_container(url: str) -> S3Keys:
    """What Amazon's container services give, and those that do as they do."""
    place = urlsplit(url)
    if place.scheme != "https" and place.hostname not in _CONTAINERS:
        raise RequestError(f"{url} is asked for no keys: AWS_CONTAINER_CREDENTIALS_FULL_URI has to be https://")
    token = named("AWS_CONTAINER_AUTHORIZATION_TOKEN")
    if token_file := named("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"):
        token = _token_in(token_file)
    try:
        answer = fetched("GET", url, headers={"Authorization": token} if token else {}, near=True)
    except Refused as error:
        raise RequestError(f"{url} gives no keys ({error}): mend AWS_CONTAINER_CREDENTIALS_*") from None
    return _parsed(url, answer, "Token")


def _of_machine() -> S3Keys:
    """What a machine of Amazon's has by itself; on any other it is soon known that nobody answers as it should."""
    server = (named("AWS_EC2_METADATA_SERVICE_ENDPOINT", "AWS_METADATA_ENDPOINT") or _METADATA).rstrip("/")
    ask = partial(fetched, near=True, times=1, patience=_SOON)
    headers: dict[str, str] = {}
    with suppress(Refused, TimeoutError):  # an older server, or a container that the answer does not reach
        life = {"X-aws-ec2-metadata-token-ttl-seconds": "600"}
        headers["X-aws-ec2-metadata-token"] = ask("PUT", f"{server}/latest/api/token", b"", life).decode()
    roles = f"{server}/latest/meta-data/iam/security-credentials/"
    role = ask("GET", roles, headers=headers).decode().partition("\n")[0]
    return _parsed(server, ask("GET", roles + quote(role), headers=headers), "Token")


def _of_process(command: str) -> S3Keys:
    called = "the credential_process of the AWS profile"
    try:
        # A corpus may come on standard input.
        done = subprocess.run(shlex.split(command), stdin=subprocess.DEVNULL, capture_output=True, check=True)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        raise RequestError(f"{called} gives no keys: {last}") from None
    except (OSError, ValueError) as error:  # the second of a quotation that nothing ends
        raise RequestError(f"{called} cannot be run: {error}") from None
    return _parsed(called, done.stdout, "SessionToken")


def _parsed(giver: str, text: bytes, token: str) -> S3Keys:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise RequestError(f"{giver} gives no keys (its answer is no JSON: {error})") from None
    return _told(giver, found, token)


def _told(giver: str, found: Any, token: str) -> S3Keys:
    try:
        until = found.get("Expiration")
        when = datetime.datetime.fromisoformat(until) if until else None
        if when and when.tzinfo is None:
            when = when.replace(tzinfo=datetime.UTC)
        return S3Keys(found["AccessKeyId"], found["SecretAccessKey"], found.get(token), when)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{giver} gives no keys (their Expiration: {error})") from None
    except (AttributeError, KeyError) as error:
        raise RequestError(f"{giver} gives no keys (its answer has no {error})") from None


def _of_botocore(name: str) -> Callable[[], S3Keys]:
    """Keys of a profile with a role or single sign-on, which Amazon's own client gets, and renews."""
    by_hand = f'eval "$(aws configure export-credentials --profile {shlex.quote(name)} --format env)"'
    try:
        session: Any = importlib.import_module("botocore.session")
        errors: Any = importlib.import_module("botocore.exceptions")
    except ImportError:
        raise RequestError(
            f"the AWS profile {name} gets its keys by a role or single sign-on, which takes boto3: pip install boto3, "
            f"or {by_hand}"
        ) from None
    mine = session.Session(profile=name)
    mine.set_config_variable("region", region())  # it does not know AWS_REGION

    def ask() -> S3Keys:
        try:
            found = mine.get_credentials().get_frozen_credentials()
        except (errors.BotoCoreError, errors.ClientError) as error:
            told = " ".join(str(error).split())
            raise RequestError(
                f"the AWS profile {name} gives no keys ({told}): log in again (aws sso login --profile "
                f"{shlex.quote(name)}), or mend it"
            ) from error
        return S3Keys(found.access_key, found.secret_key, found.token, datetime.datetime.now(datetime.UTC) + _A_WHILE)

    return ask
