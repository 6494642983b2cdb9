"""Ends with 0 if the service at HOST:PORT is ready, with or without TLS: the health check of the image.

Whose certificate it is does not matter where the service asks itself. A service that wants one of its clients, too
(mTLS), hangs up on this one, which has none; that it is there to do so is all that can be known.
"""

from __future__ import annotations

import ssl
import sys
import urllib.error
import urllib.request
from http.client import RemoteDisconnected

TIMEOUT_S = 3
UNVERIFIED = ssl.create_default_context()
UNVERIFIED.check_hostname = False
UNVERIFIED.verify_mode = ssl.CERT_NONE


def is_ready(address: str) -> bool:
    """Whether it answers `/readyz` with 200, or hangs up once it has shown its certificate."""
    for scheme in ("http", "https"):
        try:
            with urllib.request.urlopen(f"{scheme}://{address}/readyz", timeout=TIMEOUT_S, context=UNVERIFIED):
                return True
        except urllib.error.HTTPError:
            return False
        except RemoteDisconnected:
            if scheme == "https":
                return True
        except OSError as error:
            if "CERTIFICATE_REQUIRED" in str(error):
                return True
    return False


if __name__ == "__main__":
    sys.exit(not is_ready(sys.argv[1]))
