"""The certificate with which both ports answer, tried before anything is built."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from leanserve.config.auth_section import TlsConfig
from leanserve.config.yaml import read_yaml
from leanserve.disk import open_regular
from leanserve.errors import ConfigError

if TYPE_CHECKING:
    import grpc


class TlsFiles(NamedTuple):
    """PEM files that can be read and belong together; with `client_ca` clients need a certificate, too (mTLS)."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def uvicorn_options(self) -> dict[str, str | int]:
        """As arguments of `uvicorn.Config`."""
        options: dict[str, str | int] = {"ssl_certfile": str(self.certificate), "ssl_keyfile": str(self.key)}
        if self.client_ca is not None:
            options |= {"ssl_ca_certs": str(self.client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
        return options

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """The same for gRPC."""
        import grpc

        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        authorities = None if self.client_ca is None else self.client_ca.read_bytes()
        return grpc.ssl_server_credentials([pair], authorities, require_client_auth=self.client_ca is not None)


def tls_files(tls: TlsConfig | None, path: Path) -> TlsFiles | None:
    """The files that the config at `path` names; `None` where it names none.

    Raises:
        ConfigError: one cannot be read, is no PEM, has a password, or key and certificate do not belong together.
    """
    if tls is None:
        return None
    at = path.parent
    found = TlsFiles(at / tls.certificate, at / tls.key, None if tls.client_ca is None else at / tls.client_ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for name, file in found._asdict().items():
        if file is not None:
            try:
                open_regular(file).close()
                if name == "client_ca":
                    context.load_verify_locations(file)
            except OSError as error:
                raise _wrong(path, name, f"{file}: {_reason(error)}") from None
    try:
        context.load_cert_chain(found.certificate, found.key, _no_password)
    except OSError as error:
        raise _wrong(path, "key", f"{found.key} is not the key of {found.certificate}: {_reason(error)}") from None
    return found


def _no_password() -> str:
    """OpenSSL would ask for it on the terminal."""
    return ""


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"not read by OpenSSL ({error.reason or 'no PEM'})"
    return error.strerror or str(error)


def _wrong(path: Path, key: str, text: str) -> ConfigError:
    return ConfigError(f"{read_yaml(path).place(('tls', key))}: tls.{key}: {text}")
