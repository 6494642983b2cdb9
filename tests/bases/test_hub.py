"""Files of the hub: the cache first and without network, downloads from a hub in miniature, refusals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from leanserve.bases.sources import hub as hub_module
from leanserve.bases.sources.hub import hub_file, hub_folder
from leanserve.errors import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no way out."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return folder


def cached(cache: Path, repo: str, files: Mapping[str, str]) -> Path:
    """Lay a repository out as downloads leave it; returns the folder of its files."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    folder = root / "snapshots" / COMMIT
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def test_what_is_cached_is_found_without_network(cache: Path) -> None:
    folder = cached(cache, "someone/tiny", {"config.json": "{}", "model.safetensors": "weights"})
    assert hub_file("someone/tiny", "model.safetensors").read_text() == "weights"
    assert hub_folder("someone/tiny", ("*.json", "*.safetensors"), ("config.json", "model*.safetensors")) == folder


def test_what_is_missing_is_asked_for_with_the_remedy(cache: Path) -> None:
    cached(cache, "someone/tiny", {"config.json": "{}"})
    with pytest.raises(
        ConfigError, match=r"base.weights: the file model.safetensors of 'someone/tiny' is not .*HF_HOME"
    ):
        hub_file("someone/tiny", "model.safetensors")
    with pytest.raises(ConfigError, match=r"base.transformers: the model of 'someone/other' is not .*HF_HOME"):
        hub_folder("someone/other", ("*.json",))
    with pytest.raises(ConfigError, match=r"base.transformers: 'someone/tiny' has no model\*.safetensors"):
        hub_folder("someone/tiny", ("*.json",), ("config.json", "model*.safetensors"))


def test_pickles_code_and_impossible_names_are_refused() -> None:
    for name in ("pytorch_model.bin", "modeling.py", "*"):
        with pytest.raises(ConfigError, match=r"is not fetched: only .safetensors"):
            hub_file("someone/tiny", name)
    with pytest.raises(ConfigError, match=r"base.transformers: './tiny' is no name of a model on the hub"):
        hub_folder("./tiny", ("*.json",))
    with pytest.raises(ConfigError, match=r"base.weights: the file a.json of 'a--b' .*Cannot have -- or \.\."):
        hub_file("a--b", "a.json")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"base.weights: the hub needs the extra 'text' or 'vision'"):
        hub_file("someone/tiny", "model.safetensors")


FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickle",
    "1_Pooling/config.json": b"{1}",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as downloading takes, with one repository `someone/tiny`."""

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def _answer(self, *, send: bool) -> None:
        path = self.path.partition("?")[0]
        status, body = self._found(path)
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        if status == 404:
            known = path.startswith(("/someone/tiny/", "/api/models/someone/tiny/"))
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        self.end_headers()
        if send:
            self.wfile.write(body)

    def _found(self, path: str) -> tuple[int, bytes]:
        if path == "/api/models/someone/tiny/revision/main":
            return 200, json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": []}).encode()
        if path == f"/api/models/someone/tiny/tree/{COMMIT}":
            listed = [{"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in FILES.items()]
            return 200, json.dumps(listed).encode()
        _, resolved, name = path.partition("/someone/tiny/resolve/")
        body = FILES.get(name.partition("/")[2]) if resolved else None
        return (404, b"") if body is None else (200, body)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_brings_what_was_asked_for_and_no_pickle(hub: None, cache: Path) -> None:
    assert hub_file("someone/tiny", "config.json").read_bytes() == b"{}"
    folder = hub_folder("someone/tiny", ("*.json", "*.safetensors"), ("model*.safetensors", "1_Pooling/config.json"))
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == set(FILES) - {"pytorch_model.bin"}
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_the_hub_says_what_it_does_not_have(hub: None) -> None:
    with pytest.raises(ConfigError, match=r"'someone/tiny' on the hub does not have the file other.safetensors"):
        hub_file("someone/tiny", "other.safetensors")
    with pytest.raises(ConfigError, match=r"the hub has no model 'someone/else'.*HF_TOKEN"):
        hub_file("someone/else", "model.safetensors")
    with pytest.raises(ConfigError, match="the hub has no model 'someone/else'"):
        hub_folder("someone/else", ("*.json",))
