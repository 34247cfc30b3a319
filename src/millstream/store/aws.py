"""What Amazon's own tools have of settings: the environment, and the profiles of ~/.aws. See docs/buckets.md."""

import configparser
import os

from millstream.errors import RequestError

_FILES = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
_USUAL = "us-east-1"


def named(*variables: str) -> str | None:
    """The first of some variables that is set and not empty."""
    return next(filter(None, map(os.environ.get, variables)), None)


def endpoint(service: str = "s3") -> str | None:
    """The address of a server that is not Amazon's."""
    of_all = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT") if service == "s3" else ("AWS_ENDPOINT_URL",)
    told = named(f"AWS_ENDPOINT_URL_{service.upper()}", *of_all)
    return told or _of_service(service).get("endpoint_url") or profile().get("endpoint_url")


def region() -> str:
    return named("AWS_REGION", "AWS_DEFAULT_REGION") or profile().get("region") or _USUAL


def server_of(service: str) -> str:
    """Of the server that is asked."""
    place = region()
    return endpoint(service) or f"https://{service}.{place}.amazonaws.com{'.cn' if place.startswith('cn-') else ''}"


def profile_name() -> str | None:
    """The profile that is asked for by name."""
    return named("AWS_PROFILE", "AWS_DEFAULT_PROFILE")


def profile() -> dict[str, str]:
    """What both files together say of the profile that is asked for."""
    name = profile_name() or "default"
    return _section(name, f"profile {name}", f'profile "{name}"')


def _of_service(service: str) -> dict[str, str]:
    """What the profile's section of services says of one: lines within a value."""
    name = profile().get("services")
    lines = _section(f"services {name}").get(service, "").splitlines() if name else []
    return {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}


def _section(*names: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for variable, usual in _FILES.items():
        path, told = os.path.expanduser(os.environ.get(variable) or usual), configparser.RawConfigParser(strict=False)
        try:
            told.read(path, "utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            raise RequestError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
        for name in names:
            if told.has_section(name):
                found = dict(told.items(name)) | found
    return found
