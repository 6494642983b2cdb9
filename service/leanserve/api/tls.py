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

    def read(self) -> Pem:
        """What is in them. Raises `OSError`."""
        authorities = None if self.client_ca is None else self.client_ca.read_bytes()
        return Pem(self.key.read_bytes(), self.certificate.read_bytes(), authorities)

    def context(self) -> ssl.SSLContext:
        """What handshakes over HTTP begin with.

        Raises:
            ConfigError: OpenSSL does not take them.
        """
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            made.load_cert_chain(self.certificate, self.key, _no_password)
        except OSError as error:
            raise ConfigError(f"{self.key} is not the key of {self.certificate}: {_reason(error)}") from None
        if self.client_ca is not None:
            try:
                made.load_verify_locations(self.client_ca)
            except OSError as error:
                raise ConfigError(f"{self.client_ca}: {_reason(error)}") from None
            made.verify_mode = ssl.CERT_REQUIRED
        return made


class Pem(NamedTuple):
    """The content of the files."""

    key: bytes
    certificate: bytes
    authorities: bytes | None


class ServedCertificate:
    """What both ports show, and whose clients they take; handshakes that begin after it was read again go by that."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._shown = files.read()
        self.context = files.context()
        """What handshakes over HTTP begin with now."""
        self._is_new_to_grpc = False

    def read_again(self) -> bool:
        """Whether it has changed. An authority that is gone lets in nobody any more.

        Raises:
            ConfigError: key and certificate do not belong together, or a file cannot be read; the old ones stay.
        """
        try:
            found = self._files.read()
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}") from None
        if found == self._shown:
            return False
        # Another context, and not more in this one: authorities are never taken out of one, and sessions that clients
        # would resume without showing their certificates again end with it.
        self.context = self._files.context()
        self._shown, self._is_new_to_grpc = found, True
        return True

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """The same for gRPC, which asks for what is new at every connection."""
        import grpc

        def config() -> grpc.ServerCertificateConfiguration:
            key, certificate, authorities = self._shown
            return grpc.ssl_server_certificate_configuration([(key, certificate)], authorities)

        def changed() -> grpc.ServerCertificateConfiguration | None:
            is_new, self._is_new_to_grpc = self._is_new_to_grpc, False
            return config() if is_new else None

        mutual = self._files.client_ca is not None
        return grpc.dynamic_ssl_server_credentials(config(), changed, require_client_authentication=mutual)


def tls_files(tls: TlsConfig | None, path: Path) -> TlsFiles | None:
    """The files that the config at `path` names; `None` where it names none.

    Raises:
        ConfigError: one cannot be read, is no PEM, has a password, or key and certificate do not belong together.
    """
    if tls is None:
        return None
    at = path.parent
    found = TlsFiles(at / tls.certificate, at / tls.key, None if tls.client_ca is None else at / tls.client_ca)
    for name, file in found._asdict().items():
        if file is not None:
            try:
                open_regular(file).close()
            except OSError as error:
                raise _wrong(path, name, f"{file}: {_reason(error)}") from None
    for name, files in (("key", found._replace(client_ca=None)), ("client_ca", found)):
        try:
            files.context()
        except ConfigError as error:
            raise _wrong(path, name, str(error)) from None
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
