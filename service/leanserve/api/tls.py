"""The certificate with which both ports answer, tried before anything is built, and read again when it was renewed."""

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

    def pair(self) -> tuple[bytes, bytes]:
        """The content of key and certificate."""
        return self.key.read_bytes(), self.certificate.read_bytes()

    def check_pair(self) -> None:
        """See that OpenSSL takes both.

        Raises:
            ConfigError: it does not.
        """
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, _no_password)
        except OSError as error:
            raise ConfigError(f"{self.key} is not the key of {self.certificate}: {_reason(error)}") from None


class ServedCertificate:
    """What both ports show; connections that are made after it was read again see the new one."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._shown = files.pair()
        self._authorities = None if files.client_ca is None else files.client_ca.read_bytes()
        self._for_grpc: tuple[bytes, bytes] | None = None
        """What gRPC has not asked for yet."""

    def read_again(self, http: ssl.SSLContext) -> bool:
        """Whether it has changed; `http` is what new connections over HTTP begin with.

        Raises:
            ConfigError: key and certificate do not belong together, or cannot be read; the old ones stay.
        """
        try:
            found = self._files.pair()
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}") from None
        if found == self._shown:
            return False
        self._files.check_pair()
        http.load_cert_chain(self._files.certificate, self._files.key, _no_password)
        self._shown = self._for_grpc = found
        return True

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """The same for gRPC, which asks for what is new at every connection."""
        import grpc

        def config(pair: tuple[bytes, bytes]) -> grpc.ServerCertificateConfiguration:
            return grpc.ssl_server_certificate_configuration([pair], self._authorities)

        def changed() -> grpc.ServerCertificateConfiguration | None:
            pair, self._for_grpc = self._for_grpc, None
            return None if pair is None else config(pair)

        mutual = self._authorities is not None
        return grpc.dynamic_ssl_server_credentials(config(self._shown), changed, require_client_authentication=mutual)


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
        found.check_pair()
    except ConfigError as error:
        raise _wrong(path, "key", str(error)) from None
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
