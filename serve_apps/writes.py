"""Who may change a running server: whoever knows the token; on loopback anybody, only if that was said.

Only the token's SHA-256 reaches Ray and the replicas: nothing that a dashboard, a log or a state dump shows holds it.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from meanet.errors import UserError

VARIABLE, FILE_VARIABLE = "MEANET_TOKEN", "MEANET_TOKEN_FILE"
_SHORTEST = 16


@dataclass(frozen=True)
class Refusal:
    """Why a write is not let through."""

    status: int
    detail: str
    headers: dict[str, str]


@dataclass(frozen=True)
class Writes:
    """The rule for PUT."""

    digest: str | None = None
    """SHA-256 of the token, hex; None = there is none."""
    open: bool = False
    """Without a token, requests are let through that were sent to a loopback name."""

    @staticmethod
    def read(environment: Mapping[str, str], *, open_writes: bool = False, host: str | None = None) -> "Writes":
        """The rule that the environment asks for.

        Args:
            environment: may hold the token, or the path of a file that does.
            open_writes: let writes through without a token.
            host: that the server listens on; None = not known.

        Raises:
            UserError: a token that is short or cannot be read; open writes on an address that others reach.
        """
        token = _token(environment)
        if token is not None:
            return Writes(hashlib.sha256(token.encode()).hexdigest())
        if open_writes and not (host is not None and is_loopback(host)):
            raise UserError(
                f"open writes on {host or 'an unknown address'}: anybody could change the server; listen on 127.0.0.1, "
                f"or set {VARIABLE}"
            )
        return Writes(open=open_writes)

    def refusal(self, headers: Mapping[str, str]) -> Refusal | None:
        """Why a request with these (lower-case) headers may not write; None = it may."""
        crossed = _crossed(headers)
        if crossed:
            return Refusal(403, crossed, {})
        if self.digest is None:
            if self.open and is_loopback(_name(headers.get("host", ""))):
                return None
            return Refusal(
                403,
                f"writes are off: start the server with {VARIABLE} set and send `Authorization: Bearer TOKEN` "
                "(on loopback --open-writes lets them through without)",
                {},
            )
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).hexdigest()
        if scheme.lower() == "bearer" and hmac.compare_digest(digest, self.digest):
            return None
        challenge = 'Bearer realm="meanet"' + (', error="invalid_token"' if scheme else "")
        return Refusal(
            401, "send `Authorization: Bearer TOKEN` with this server's token", {"WWW-Authenticate": challenge}
        )


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _crossed(headers: Mapping[str, str]) -> str | None:
    """Why this is a browser's request from somebody else's page; None = it is not."""
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return "a page of another site may not write"
    origin = headers.get("origin")
    if origin is not None and not _is_of(origin, headers.get("host", "")):
        return f"a page of {origin!r} may not write here"
    return None


def _is_of(origin: str, host: str) -> bool:
    """Whether an origin is that of the server's own pages; one that cannot be read is not."""
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def _name(host: str) -> str:
    """Of a Host header, without the port; empty where it cannot be read."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _token(environment: Mapping[str, str]) -> str | None:
    token, path = environment.get(VARIABLE), environment.get(FILE_VARIABLE)
    if token is None and path:
        try:
            token = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{FILE_VARIABLE} {path} cannot be read ({type(error).__name__}): mend or unset it"
            ) from error
    if token is not None and (len(token) < _SHORTEST or not token.isascii() or not token.isprintable() or " " in token):
        raise UserError(
            f"the write token has {len(token)} characters or some that a header cannot carry: give {_SHORTEST} or more "
            'of ASCII without spaces, such as `python -c "import secrets; print(secrets.token_hex(32))"` prints'
        )
    return token
