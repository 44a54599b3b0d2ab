"""Who may use a server: pages of its own origin, and whoever has its token.

A page from elsewhere that a browser shows can open a WebSocket to any address, that of this machine too, and could
drive its GPU; a browser sends along where the page is from. A name that its owner points at this machine only for
that purpose (DNS rebinding) is the origin and the host of such a page at once, so on a loopback address, only
loopback names are known.
"""

import hmac
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit


ORIGIN = (
    "like https://example.com or http://localhost:3000, as browsers send it: in lower case, a name with other letters "
    "than those of ASCII as xn--..., and without :80 of http or :443 of https"
)


@dataclass(frozen=True)
class Access:
    """
    Args:
        host: The address that the server listens on.
        token: What a client has to send; None for nothing.
        origins: Origins of pages that may use it, beside its own, as browsers send them: "https://example.com".

    Raises:
        ValueError: If one of the origins is none.
    """

    host: str = "127.0.0.1"
    token: str | None = None
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for origin in self.origins:
            if not is_origin(origin):
                raise ValueError(f"`origins` must be {ORIGIN}, not {origin!r}.")

    def refusal(self, headers: Mapping[str, str], query: Mapping[str, str]) -> str | None:
        """Return why a WebSocket that is being opened is refused; None if it is not.

        Args:
            headers: The headers of the request, by their names in lower case.
            query: The parameters of its address.
        """
        origin = headers.get("origin")
        if origin is not None and not self._knows(origin, headers.get("host", "")):
            return "a page of another origin"
        if self.token is not None and not self._is_token(headers.get("authorization", ""), query.get("token", "")):
            return "no token, or a wrong one"
        return None

    def _knows(self, origin: str, host: str) -> bool:
        if origin in self.origins:
            return True
        try:
            page = urlsplit(origin)
            name = page.hostname or ""
            is_same = page.scheme in ("http", "https") and page.netloc.lower() == host.lower()
        except ValueError:
            return False
        if not is_same:
            return False
        return not is_loopback(self.host) or is_loopback(name) or name == self.host

    def _is_token(self, authorization: str, token: str) -> bool:
        assert self.token is not None
        kind, _, bearer = authorization.partition(" ")
        given = bearer if kind.lower() == "bearer" else token
        return hmac.compare_digest(given.encode(), self.token.encode())


def is_origin(text: str) -> bool:
    """Whether browsers may send this as the origin of a page, on which a header can name it."""
    found = re.fullmatch(r"(https?)://(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([1-9][0-9]{0,4}))?", text)
    if found is None or found.groups() in (("http", "80"), ("https", "443")):
        return False
    return found[2] is None or int(found[2]) < 2**16


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, which no other machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")
