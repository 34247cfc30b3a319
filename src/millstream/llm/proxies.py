"""Which proxy requests to a server go through, if any."""

import ipaddress
from typing import NamedTuple
from urllib.parse import urlsplit

from millstream.errors import RequestError


class Proxy(NamedTuple):
    """A proxy: its `url` without a login, as messages show it, and its login."""

    url: str
    login: str | None = None


def proxy_for(url: str, given: str | None = None) -> Proxy | None:
    """The proxy for a server: the one that is given, else what the environment says, as for curl.

    That is HTTPS_PROXY or HTTP_PROXY, in capitals or not, unless NO_PROXY names the host (its domain, its network as in
    10.0.0.0/8, or *); never for this machine itself. ALL_PROXY stands for both if it is an HTTP proxy: desktops set it
    to one that speaks SOCKS. Raises RequestError for what is no URL of a proxy.
    """
    if given is not None:
        return _proxy(given, "--proxy")
    from urllib.request import getproxies_environment

    proxies = getproxies_environment()
    parts = urlsplit(url)
    others = proxies.get("all", "")
    found = proxies.get(parts.scheme) or ("" if others.startswith("socks") else others)
    if not found or _is_spared(parts.hostname or "", parts.port, proxies.get("no", "")):
        return None
    return _proxy(found, f"{parts.scheme.upper()}_PROXY")


def _proxy(url: str, source: str) -> Proxy:
    url = url.strip()
    url = url if "://" in url else f"http://{url}"  # as curl reads it
    try:
        parts = urlsplit(url)
        sound = parts.hostname and parts.port != 0 and url.isprintable() and "@" not in parts.path + parts.query
    except ValueError:
        sound = False
    if not sound:
        raise RequestError(f"{source} is no URL of a proxy: give one such as http://127.0.0.1:3128")
    if parts.scheme not in ("http", "https"):
        raise RequestError(f"{source} names a {parts.scheme} proxy; http and https proxies are spoken to")
    login, _, host = parts.netloc.rpartition("@")
    return Proxy(f"{parts.scheme}://{host}", login or None)


def _is_spared(host: str, port: int | None, spared: str) -> bool:
    """Whether a host is reached without a proxy, for it is this machine or among the `spared` of NO_PROXY.

    >>> [_is_spared(host, 80, "") for host in ("localhost", "127.0.0.9", "::1", "0.0.0.0", "10.1.2.3")]
    [True, True, True, True, False]
    >>> spared = "example.org, 10.0.0.0/8, .local, other.org:8000"
    >>> [_is_spared(host, 80, spared) for host in ("api.example.org", "example.org", "10.1.2.3", "a.local")]
    [True, True, True, True]
    >>> [_is_spared(host, 80, spared) for host in ("11.1.2.3", "ample.org", "other.org")]
    [False, False, False]
    >>> _is_spared("other.org", 8000, spared), _is_spared("any.org", 80, "*"), _is_spared("any.org", None, " , ")
    (True, True, False)
    """
    address = _address(host)
    if host == "localhost" or host.endswith(".localhost"):
        return True
    if address and (address.is_loopback or address.is_unspecified):
        return True
    for name in map(str.strip, spared.lower().split(",")):
        network = _network(name) if address else None
        if network and address in network:
            return True
        domain = name.removesuffix(f":{port}").lstrip("*.")
        if name == "*" or (domain and f".{host}".endswith(f".{domain}")):
            return True
    return False


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _network(name: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(name, strict=False)
    except ValueError:
        return None
