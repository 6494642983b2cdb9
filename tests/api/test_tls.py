"""TLS and mTLS on both ports, with certificates that the test makes; and what is told of wrong ones before a start."""

from __future__ import annotations

import asyncio
import contextlib
import runpy
import select
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import trustme
from tritonclient import grpc as triton_grpc
from tritonclient import http as triton_http
from tritonclient.utils import InferenceServerException

from fakes import Live, live_server
from leanserve.api.tls import tls_files
from leanserve.config.auth_section import TlsConfig
from leanserve.errors import ConfigError

LARGE = 2**20
ROWS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server's certificate, a client's, and one of an authority that nobody knows."""
    at = tmp_path_factory.mktemp("tls")
    ours, others = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(at / "ca.pem")
    for name, authority, identity in (
        ("server", ours, "127.0.0.1"),
        ("client", ours, "client@example.com"),
        ("stranger", others, "stranger@example.com"),
    ):
        made = authority.issue_cert(identity)
        made.private_key_pem.write_to_path(at / f"{name}.key")
        for blob in made.cert_chain_pems:
            blob.write_to_path(at / f"{name}.pem", append=True)
    (at / "leanserve.yaml").write_text(
        "base: digits\ntls:\n  certificate: server.pem\n  key: server.key\nvariants: []\n"
    )
    return at


@pytest.fixture(scope="module", params=["tls", "mtls"])
def live(folder: Path, request: pytest.FixtureRequest) -> Iterator[Live]:
    authority = Path("ca.pem") if request.param == "mtls" else None
    declared = TlsConfig(certificate=Path("server.pem"), key=Path("server.key"), client_ca=authority)
    with live_server(tls=tls_files(declared, folder / "leanserve.yaml"), limits={"body_bytes": LARGE}) as server:
        yield server


def is_mutual(live: Live) -> bool:
    tls = live.server._address.tls  # type: ignore[attr-defined]
    return tls.client_ca is not None


def client(live: Live, folder: Path, name: str | None = "client") -> httpx.Client:
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    if name is not None:
        context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    return httpx.Client(base_url=f"https://{live.http}", verify=context)


def test_both_ways_of_a_connection(live: Live, folder: Path) -> None:
    """Also bodies that are read in place where there is no TLS, whole, refused, and with what follows."""
    pixels = np.arange(4 * 8000, dtype=np.float32).reshape(8000, 1, 2, 2).tolist()
    with client(live, folder) as http:
        for _ in range(2):
            assert http.get("/readyz").json() == {"ready": True}
            row = {"name": "image", "shape": [1, 1, 2, 2], "datatype": "FP32", "data": [0, 1, 2, 3]}
            assert http.post("/v2/models/pixels/infer", json={"inputs": [row]}).status_code == 200
            many = row | {"shape": [ROWS, 1, 2, 2], "data": pixels[:ROWS], "parameters": {"note": "x" * 200_000}}
            reply = http.post("/v2/models/pixels/infer", json={"inputs": [many]})
            assert reply.json()["outputs"][0]["shape"] == [ROWS, 4], reply.text
            assert http.post("/v1/predict", content=bytes(2 * LARGE)).status_code in {413, 415}
            assert http.get("/v1/variants").status_code == 200


def test_clients_of_others(live: Live, folder: Path) -> None:
    tensor = triton_http.InferInput("image", [1, 1, 2, 2], "FP32")
    tensor.set_data_from_numpy(np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2))
    options = {
        "keyfile": str(folder / "client.key"),
        "certfile": str(folder / "client.pem"),
        "ca_certs": str(folder / "ca.pem"),
    }
    with triton_http.InferenceServerClient(live.http, ssl=True, ssl_options=options) as over_http:
        assert over_http.infer("pixels", [tensor]).as_numpy("logits").shape == (1, 4)
    pem = {
        "root_certificates": folder / "ca.pem",
        "private_key": folder / "client.key",
        "certificate_chain": folder / "client.pem",
    }
    with triton_grpc.InferenceServerClient(
        live.grpc, ssl=True, **{name: str(path) for name, path in pem.items()}
    ) as over_grpc:
        assert over_grpc.is_model_ready("pixels")


def test_who_has_no_certificate_of_ours_is_refused_where_one_is_asked_for(live: Live, folder: Path) -> None:
    for name in (None, "stranger"):
        channel = grpc.secure_channel(live.grpc, _credentials(folder, name))
        with client(live, folder, name) as http, channel:
            if is_mutual(live):
                with pytest.raises(httpx.TransportError):
                    http.get("/healthz")
            elif name is None:
                assert http.get("/healthz").status_code == 200
            ready = grpc.channel_ready_future(channel)
            if is_mutual(live):
                with pytest.raises(grpc.FutureTimeoutError):
                    ready.result(timeout=0.5)
            else:
                ready.result(timeout=10)


def _credentials(folder: Path, name: str | None) -> grpc.ChannelCredentials:
    if name is None:
        return grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes())
    pair = ((folder / f"{name}.key").read_bytes(), (folder / f"{name}.pem").read_bytes())
    return grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes(), *pair)


def test_plain_text_is_not_answered(live: Live) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{live.http}/healthz")
    with triton_grpc.InferenceServerClient(live.grpc) as plain, pytest.raises(InferenceServerException):
        plain.is_server_live(client_timeout=1)


def test_the_health_check_of_the_image_works_with_and_without_tls(live: Live) -> None:
    is_ready = runpy.run_path(str(Path(__file__).parents[2] / "deploy/ready.py"))["is_ready"]
    assert is_ready(live.http)
    with live_server() as plain:
        assert is_ready(plain.http)
        plain.service.fleet.drain()
        assert not is_ready(plain.http)
    assert not is_ready(plain.http)


def test_who_says_nothing_is_not_waited_for(folder: Path) -> None:
    declared = TlsConfig(certificate=Path("server.pem"), key=Path("server.key"))
    with live_server(tls=tls_files(declared, folder / "leanserve.yaml"), limits={"head_s": 0.5}) as live:
        host, _, port = live.http.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=10) as silent:
            began = time.monotonic()
            assert silent.recv(1) == b""
            assert time.monotonic() - began > 0.4
        with client(live, folder, None) as http:
            assert http.get("/readyz").status_code == 200


def silent_ones(address: str, count: int) -> list[socket.socket]:
    """Connections that never begin their handshake."""
    host, _, port = address.rpartition(":")
    return [socket.create_connection((host, int(port)), timeout=10) for _ in range(count)]


def closed(connections: list[socket.socket], seconds: float) -> int:
    """How many of them the server ends within so long."""
    give_up = time.monotonic() + seconds
    left = list(connections)
    while left and time.monotonic() < give_up:
        for each in select.select(left, [], [], 0.05)[0]:
            with contextlib.suppress(ConnectionError):
                assert each.recv(100) == b""
            left.remove(each)
    return len(connections) - len(left)


@pytest.mark.parametrize("port", ["http", pytest.param("grpc", marks=pytest.mark.soak)])
def test_who_says_nothing_counts_and_locks_nobody_out(folder: Path, port: str) -> None:
    declared = TlsConfig(certificate=Path("server.pem"), key=Path("server.key"))
    limits = {"connections": 4, "head_s": 0.6}
    with live_server(tls=tls_files(declared, folder / "leanserve.yaml"), limits=limits) as live:
        silent = silent_ones(getattr(live, port), 7)
        try:
            assert 0 < closed(silent, 0.4) < len(silent), "more than may be open are not kept, whatever they say"
            if port == "http":
                with client(live, folder, None) as http:
                    assert http.get("/readyz").status_code == 200, "they make room"
            assert closed(silent, 3.0) == len(silent), "and none is waited for"
        finally:
            for each in silent:
                each.close()


def test_clients_of_an_authority_that_is_gone_are_refused(tmp_path: Path) -> None:
    ours, next_one = trustme.CA(), trustme.CA()
    for name, authority, identity in (
        ("server", ours, "127.0.0.1"),
        ("client", ours, "old@example.com"),
        ("new", next_one, "new@example.com"),
    ):
        made = authority.issue_cert(identity)
        made.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        made.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    ours.cert_pem.write_to_path(tmp_path / "ca.pem")
    ours.cert_pem.write_to_path(tmp_path / "clients.pem")
    declared = TlsConfig(certificate=Path("server.pem"), key=Path("server.key"), client_ca=Path("clients.pem"))

    def welcome(live: Live, name: str) -> tuple[bool, bool]:
        """Over HTTP, and over gRPC."""
        ready = True
        with client(live, tmp_path, name) as http, grpc.secure_channel(live.grpc, _credentials(tmp_path, name)) as call:
            try:
                http.get("/readyz").raise_for_status()
            except httpx.TransportError:
                ready = False
            try:
                grpc.channel_ready_future(call).result(timeout=10 if ready else 0.5)
            except grpc.FutureTimeoutError:
                return ready, False
        return ready, True

    with live_server(tls=tls_files(declared, tmp_path / "leanserve.yaml")) as live:
        assert welcome(live, "client") == (True, True)
        assert welcome(live, "new") == (False, False)
        with client(live, tmp_path, "client") as kept:
            assert kept.get("/readyz").status_code == 200
            next_one.cert_pem.write_to_path(tmp_path / "clients.pem")
            read_again(live)
            assert kept.get("/readyz").status_code == 200, "what is open stays"
        assert welcome(live, "new") == (True, True)
        assert welcome(live, "client") == (False, False)
        (tmp_path / "clients.pem").write_text("nobody")
        read_again(live)
        assert welcome(live, "new") == (True, True), "what cannot be read changes nothing"


def shown(address: str) -> str:
    """The certificate that a new connection is shown."""
    host, _, port = address.rpartition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=10)


def read_again(live: Live) -> None:
    """What SIGHUP does about certificates."""
    server: Any = live.server
    renewing = server._renew_certificate(live.service.fleet)
    asyncio.run_coroutine_threadsafe(renewing, server._listening._accepting.get_loop()).result(10)


def test_a_renewed_certificate_is_shown_to_new_connections(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")

    def renew() -> str:
        made = authority.issue_cert("127.0.0.1")
        made.private_key_pem.write_to_path(tmp_path / "server.key")
        made.cert_chain_pems[0].write_to_path(tmp_path / "server.pem")
        return (tmp_path / "server.pem").read_text()

    first = renew()
    declared = TlsConfig(certificate=Path("server.pem"), key=Path("server.key"))
    with (
        live_server(tls=tls_files(declared, tmp_path / "leanserve.yaml")) as live,
        client(live, tmp_path, None) as kept,
    ):
        assert kept.get("/readyz").status_code == 200
        assert {shown(live.http), shown(live.grpc)} == {first}
        second = renew()
        for _ in range(2):
            read_again(live)
            assert {shown(live.http), shown(live.grpc)} == {second}
        assert kept.get("/readyz").status_code == 200, "what is open stays"
        (tmp_path / "server.key").write_text("no key")
        read_again(live)
        assert {shown(live.http), shown(live.grpc)} == {second}
    told = [record.getMessage().partition(":")[2] for record in caplog.records if record.msg.startswith("tls:")]
    assert told[0] == " the files have changed; new connections go by them"
    assert "server.key is not the key of" in told[1]
    assert len(told) == 2


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"certificate": "missing.pem"}, r"leanserve.yaml:3: tls.certificate: .*missing.pem: No such file"),
        ({"key": "client.key"}, r"leanserve.yaml:4: tls.key: .*client.key is not the key of .*server.pem"),
        ({"key": "leanserve.yaml"}, r"tls.key: .*leanserve.yaml is not the key"),
        ({"key": "."}, r"tls.key: .*not a regular file"),
        ({"certificate": "/dev/zero"}, r"tls.certificate: /dev/zero: not a regular file"),
        ({"client_ca": "leanserve.yaml"}, r"leanserve.yaml:2: tls.client_ca: .*leanserve.yaml: not read by OpenSSL"),
        ({"client_ca": "/dev/null"}, r"tls.client_ca: /dev/null: not a regular file"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_built(folder: Path, changes: dict[str, str], text: str) -> None:
    declared = TlsConfig.model_validate({"certificate": "server.pem", "key": "server.key"} | changes)
    with pytest.raises(ConfigError, match=text) as refused:
        tls_files(declared, folder / "leanserve.yaml")
    assert "\n" not in str(refused.value)


def test_a_key_with_a_password_is_refused_and_nobody_is_asked(folder: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    made = serialization.load_pem_private_key((folder / "server.key").read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"secret")
    form = serialization.PrivateFormat.TraditionalOpenSSL
    (folder / "locked.key").write_bytes(made.private_bytes(serialization.Encoding.PEM, form, locked))
    declared = TlsConfig(certificate=Path("server.pem"), key=Path("locked.key"))
    with pytest.raises(ConfigError, match=r"tls.key: .*locked.key is not the key of"):
        tls_files(declared, folder / "leanserve.yaml")


def test_no_file_is_needed_where_there_is_no_tls(tmp_path: Path) -> None:
    assert tls_files(None, tmp_path / "x.yaml") is None
