"""Who may do what: the one place that decides, for HTTP and gRPC alike.

A route names the role that it asks for (`http.messages.Route`), a call of gRPC as well (`grpc_server.METHODS`); so none
can be added without. Admin verbs are guarded from web pages, too: a browser sends what a page wants to whatever the
browser reaches, loopback included, without asking anybody (CSRF), and a name may come to mean another address
(DNS rebinding). Sources: RFC 6750 (Bearer), RFC 9110 (401, 403), the Fetch standard (`Origin`).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Iterable, Mapping
from ipaddress import ip_address
from typing import NamedTuple

from leanserve.errors import Forbidden, RateLimited, Unauthorized, UnsupportedMediaType
from leanserve.http.messages import Role
from leanserve.token_bucket import TokenBucket

HOW = "send it as the header `Authorization: Bearer KEY` or `x-api-key: KEY`"
_NOBODY = b"\0" * 32
"""No key's sha256."""

_FORMS = (b"application/x-www-form-urlencoded", b"multipart/form-data")


class Key(NamedTuple):
    """A key: its name in the log, its sha256, what it may do, how often."""

    name: str
    digest: bytes
    roles: Collection[str]
    bucket: TokenBucket | None = None


def _is_same(before: Key | None, after: Key) -> bool:
    if before is None:
        return False
    return (before.digest, before.roles, _rate(before)) == (after.digest, after.roles, _rate(after))


def _rate(key: Key) -> tuple[float, int] | None:
    return None if key.bucket is None else (key.bucket.rate, key.bucket.burst)


class Access:
    """Admits requests, or refuses them. On the event loop only."""

    def __init__(self, keys: Iterable[Key] = (), pages: Iterable[str] = (), *, local: bool = False) -> None:
        """`pages` are the origins of pages that may use admin verbs; `local`: only this machine reaches the ports."""
        self._keys: dict[bytes, Key] = {}
        self._pages = {page.encode() for page in pages} - {b"*"}
        self._local = local
        self.keyed = False
        """Whether anything but an admin verb asks for a key."""
        self.renew(keys)

    def renew(self, keys: Iterable[Key]) -> list[str]:
        """From now on these keys are known: what has changed, in words that tell no key.

        Of a key that stays what it was, the rate goes on.
        """
        before = {key.name: key for key in self._keys.values()}
        after = {key.name: before[key.name] if _is_same(before.get(key.name), key) else key for key in keys}
        self._keys = {key.digest: key for key in after.values()}
        self.keyed = bool(after)
        withdrawn = [f"'{name}' is withdrawn" for name in before if name not in after]
        new = [f"'{name}' is new" for name in after if name not in before]
        other = [f"'{name}' has changed" for name, key in before.items() if after.get(name, key) is not key]
        return [*withdrawn, *new, *other]

    def admit(self, role: Role, headers: Mapping[bytes, bytes]) -> str | None:
        """Admit a request with these headers (names in lower case) to what asks for `role`: the name of its key.

        Raises:
            Unauthorized: it has no key, or one that nobody knows. Forbidden: the key may not. RateLimited: too often.
        """
        if role == "open":
            return None
        if not self._keys:
            if role == "admin" and not self._local:
                raise Unauthorized("admin verbs need a key where other machines reach the service: see auth.keys")
            return None
        key = self._key_in(headers)
        if role not in key.roles:
            raise Forbidden(f"the key '{key.name}' has not the role '{role}', but {', '.join(sorted(key.roles))}")
        if key.bucket is not None and (wait_s := key.bucket.take()):
            raise RateLimited(f"the key '{key.name}' is used too often (auth.keys.rate_per_s)", retry_after_s=wait_s)
        return key.name

    def _key_in(self, headers: Mapping[bytes, bytes]) -> Key:
        sent = headers.get(b"x-api-key")
        if sent is None:
            scheme, _, sent = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer":
                raise Unauthorized(f"this needs a key; {HOW}")
        digest = hashlib.sha256(sent.strip()).digest()
        # The look-up is by a digest that a client cannot steer, and what it finds is compared in constant time: how
        # long either takes tells nothing about a key.
        key = self._keys.get(digest)
        if not hmac.compare_digest(digest, _NOBODY if key is None else key.digest) or key is None:
            raise Unauthorized(f"nobody here knows this key; {HOW}")
        return key

    def admit_over_http(self, role: Role, headers: Mapping[bytes, bytes]) -> str | None:
        """As `admit`; an admin verb must also be none that a web page of others may have sent.

        Raises:
            UnsupportedMediaType: an admin verb whose body is not said to be JSON. Forbidden: of a foreign page.
        """
        name = self.admit(role, headers)
        if role == "admin":
            self._refuse_pages(headers)
        return name

    def _refuse_pages(self, headers: Mapping[bytes, bytes]) -> None:
        host, origin = headers.get(b"host", b""), headers.get(b"origin")
        if not self._keys and not _is_address(host):
            raise Forbidden("without auth.keys admin verbs are taken by address or localhost only, not by a name")
        if origin is not None and origin not in self._pages and origin not in {b"http://" + host, b"https://" + host}:
            raise Forbidden("admin verbs are not taken from pages of other origins; cors.origins names those that may")
        sent = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        # A page of others cannot send JSON without asking first. Triton's clients send no type, or text/plain.
        if sent != b"application/json" and (sent in _FORMS or _is_by_browser(headers)):
            raise UnsupportedMediaType("admin verbs take content-type: application/json")


def _is_by_browser(headers: Mapping[bytes, bytes]) -> bool:
    """By what no page can leave out."""
    known = b"origin" in headers or b"sec-fetch-site" in headers
    return known or headers.get(b"user-agent", b"").startswith(b"Mozilla/")


def _is_address(host: bytes) -> bool:
    """Whether a `Host` header is an IP address or localhost, which no page can have mean another machine."""
    name = host.decode("latin-1").rpartition(":")[0] if b":" in host.rpartition(b"]")[2] else host.decode("latin-1")
    return is_loopback(name) or _is_ip(name.strip("[]"))


def _is_ip(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    return host == "localhost" or (_is_ip(host) and ip_address(host).is_loopback)
