"""`POST /v1/embeddings`: OpenAI's own client unmodified, and what any client gets that sends something wrong."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import Live, live_server
from leanserve.api.openai import embeddings
from leanserve.config.schema import EmbeddingsConfig
from leanserve.contracts import Arrays
from leanserve.errors import ConfigError
from leanserve.serving import session
from leanserve.serving.batch_runner import Prediction
from leanserve.serving.length_groups import length_groups
from leanserve.serving.variant import Variant
from openapi import body_of
from text_fleet import CLS, MAX_LENGTH, SEP, WORDS, A, B, embedded, live_texts


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_texts(
        tmp_path_factory.mktemp("tokenizer"), limits={"body_bytes": 200_000}, batch={"queue_rows": 2048}
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{live.http}/v1", api_key="none is needed", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A service whose clients may send ids of its own tokenizer."""
    folder = tmp_path_factory.mktemp("own")
    with (
        live_texts(folder, embeddings={"token_ids": "own"}, batch={"queue_rows": 2048}) as server,
        openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def http(live: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{live.http}") as client:
        yield client


def ids_of(text: str) -> list[int]:
    return [CLS, *map(WORDS.index, text.split()), SEP]


def post(http: httpx.Client, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    return http.post("/v1/embeddings", content=content, headers=headers)


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


@pytest.mark.parametrize("form", ["float", "base64"])
@pytest.mark.parametrize(
    ("sent", "rows"),
    [
        ("a b", [ids_of("a b")]),
        (["b", "a a", ""], [ids_of("b"), ids_of("a a"), [CLS, SEP]]),
    ],
    ids=["text", "texts"],
)
def test_the_client_of_openai_gets_embeddings(client: openai.OpenAI, sent: Any, rows: Any, form: Any) -> None:
    reply = client.embeddings.create(model="words", input=sent, encoding_format=form, user="somebody")
    assert reply.object == "list"
    assert reply.model in {"a", "b"}
    assert [(item.object, item.index) for item in reply.data] == [("embedding", index) for index in range(len(rows))]
    wanted = np.array([embedded(row) for row in rows], np.float32)
    given: list[Any] = [item.embedding for item in reply.data]
    if form == "base64":  # asked for explicitly, the client hands it on as it is
        given = [np.frombuffer(base64.b64decode(text), "<f4") for text in given]
    np.testing.assert_array_equal(np.array(given, np.float32), wanted)
    assert reply.usage.prompt_tokens == reply.usage.total_tokens == sum(map(len, rows))


@pytest.mark.parametrize("sent", [[CLS, A, SEP], [[A], [B, A]], [[15339, 1917], [A]], [[-1]]], ids=str)
def test_token_ids_are_refused_with_the_remedy(client: openai.OpenAI, sent: Any) -> None:
    """A number says nothing of its tokenizer: those that this one has are refused as well."""
    with pytest.raises(
        openai.BadRequestError, match="those of another tokenizer would be embedded as other"
    ) as refused:
        client.embeddings.create(model="words", input=sent)
    assert (refused.value.param, refused.value.code, refused.value.type) == (
        "input",
        "bad_input",
        "invalid_request_error",
    )
    assert "check_embedding_ctx_length=False" in str(refused.value)
    assert "embeddings: {token_ids: own}" in str(refused.value)


def test_what_langchain_sends_by_default_is_refused_and_with_the_remedy_answered(http: httpx.Client) -> None:
    """`OpenAIEmbeddings` cuts "hello world" with tiktoken's cl100k_base, and asks OpenAI's client for that."""
    request = {"model": "words", "encoding_format": "base64"}
    assert "check_embedding_ctx_length" in error_of(post(http, request | {"input": [[15339, 1917]]}), 400)["message"]
    assert post(http, request | {"input": ["hello world"]}).status_code == 200


@pytest.mark.parametrize(
    ("sent", "rows"),
    [([CLS, A, SEP], [[CLS, A, SEP]]), ([[A], [B, A]], [[A], [B, A]]), (["a"], [ids_of("a")]), ("b", [ids_of("b")])],
    ids=["tokens", "lists of tokens", "texts", "text"],
)
def test_own_token_ids_are_taken_as_they_are(own: openai.OpenAI, sent: Any, rows: Any) -> None:
    reply = own.embeddings.create(model="words", input=sent)
    wanted = np.array([embedded(row) for row in rows], np.float32)
    np.testing.assert_array_equal(np.array([item.embedding for item in reply.data], np.float32), wanted)
    assert reply.usage.prompt_tokens == sum(map(len, rows))


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ([len(WORDS)], f"input: {len(WORDS)} is no token id of this model; they go from 0 to {len(WORDS) - 1}"),
        ([[A], [-1]], r"input\[1\]: -1 is no token id"),
        ([[A], []], rf"input\[1\] has 0 token ids; the model takes 1 to {MAX_LENGTH}"),
        ([A] * 65, "input has 65 token ids"),
        ([[A], "a"], r"input\[1\] is not a list of token ids"),
        ([7, "a"], "does not mix"),
        ([[A], [1.5]], r"input\[1\] is not a list of token ids"),
    ],
    ids=["unknown", "negative", "none", "long", "text behind", "text after", "float"],
)
def test_own_token_ids_that_the_model_does_not_have_are_named(own: openai.OpenAI, sent: Any, said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        own.embeddings.create(model="words", input=sent)
    assert refused.value.param == "input"


def test_more_rows_of_token_ids_than_a_request_may_hold_are_refused(own: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="2049 rows are more than the 2048") as refused:
        own.embeddings.create(model="words", input=[[A]] * 2049)
    assert refused.value.status_code == 413


def test_the_client_asks_for_base64_by_itself_and_reads_it(client: openai.OpenAI) -> None:
    raw = client.embeddings.with_raw_response.create(model="words", input="a b")
    assert b'"encoding_format":"base64"' in raw.http_request.content
    assert raw.parse().data[0].embedding == list(np.array(embedded(ids_of("a b")), np.float32))


def test_base64_and_decimal_are_the_same_bits(http: httpx.Client) -> None:
    request = {"model": "words:a", "input": ["a b c", "one two"]}
    decimal, packed = (post(http, request | {"encoding_format": form}).json()["data"] for form in ("float", "base64"))
    for one, other in zip(decimal, packed, strict=True):
        assert np.array(one["embedding"], "<f4").tobytes() == base64.b64decode(other["embedding"])


@pytest.mark.parametrize("model", ["b", "words:b"])
def test_a_model_may_be_a_variant(client: openai.OpenAI, model: str) -> None:
    raw = client.embeddings.with_raw_response.create(model=model, input="a", dimensions=4)
    assert raw.parse().model == "b"
    assert raw.headers["x-variant"] == "b"
    assert float(raw.headers["x-inference-ms"]) >= 0
    assert float(raw.headers["x-queue-ms"]) >= 0
    assert raw.headers["x-batch-rows"] == "1"


def test_headers_choose_where_the_model_does_not(http: httpx.Client) -> None:
    request = {"model": "words", "input": "a"}
    assert {post(http, request, **{"x-variant": "b"}).json()["model"] for _ in range(8)} == {"b"}
    sticky = {key: {post(http, request, **{"x-caller-key": key}).json()["model"] for _ in range(4)} for key in "rstuvw"}
    assert all(len(models) == 1 for models in sticky.values())
    assert set.union(*sticky.values()) == {"a", "b"}
    error = error_of(post(http, {"model": "words:a", "input": "a"}, **{"x-variant": "b"}), 400)
    assert "name two variants" in error["message"]
    assert post(http, {"model": "a", "input": "a"}, **{"x-variant": "a"}).status_code == 200


def test_texts_of_different_length_queue_apart(live: Live, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, shapes = live.fleet.variants["a"], []

    async def watched(sample: Arrays, *rest: Any) -> Prediction:
        shapes.append(sample[0].shape)
        return await Variant.predict(variant, sample, *rest)

    monkeypatch.setattr(variant, "predict", watched)
    data = post(http, {"model": "a", "input": ["a " * count for count in (3, 60, 1, 20, 2)]}).json()["data"]
    assert shapes == [(3, 5), (1, 22), (1, 62)]
    assert [item["embedding"][0] for item in data] == [5, 62, 3, 22, 4]


def test_a_group_that_fails_fails_the_request(http: httpx.Client) -> None:
    error = error_of(post(http, {"model": "a", "input": ["a", "five", "a " * 40]}), 500)
    assert (error["type"], error["code"]) == ("server_error", "backend_failed")
    assert "secret" not in error["message"]


def test_rows_are_grouped_by_the_next_power_of_two() -> None:
    assert length_groups([5]) == [[0]]
    assert length_groups([17, 16, 1, 32, 33]) == [[1, 2], [0, 3], [4]]


def test_large_bodies_and_replies_take_the_same_way_through_a_thread(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a", "b"] * 600
    small = post(http, {"model": "b", "input": texts[:2]}).json()
    monkeypatch.setattr(session, "QUICK_BYTES", 10)
    assert len(orjson.dumps(texts)) > embeddings.SMALL
    large = post(http, {"model": "b", "input": texts}).json()
    assert [item["embedding"] for item in large["data"]] == [item["embedding"] for item in small["data"]] * 600


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"input": None}, "input", "missing"),
        ({"input": []}, None, "empty list"),
        ({"input": ["a", 7]}, None, r"input[1]: expected a text, got a number"),
        ({"input": [["a"]]}, None, "input[0]: expected a text, got a list"),
        ({"input": [True]}, None, "got a boolean"),
        ({"input": [1.5]}, None, "got a number"),
        ({"input": {"text": "a"}}, None, "got an object"),
        ({"model": None}, "model", "missing"),
        ({"model": 7}, "model", "'model' must be a text"),
        ({"encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"encoding_format": []}, "encoding_format", "'float' or 'base64'"),
        ({"dimensions": 2}, "dimensions", "must be 4, or left out"),
        ({"dimensions": True}, "dimensions", "must be 4"),
        ({"user": 7}, "user", "must be a text"),
        ({"truncate": "end"}, "truncate", "unknown key 'truncate'"),
    ],
)
def test_what_is_wrong_is_named(http: httpx.Client, changes: dict[str, Any], param: str | None, said: str) -> None:
    error = error_of(post(http, {"model": "words", "input": "a"} | changes), 400)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, "bad_input")
    assert said in error["message"]


def test_nulls_are_left_out_keys(http: httpx.Client) -> None:
    request = {"model": "words", "input": "a", "encoding_format": None, "dimensions": None, "user": None}
    assert isinstance(post(http, request).json()["data"][0]["embedding"], list)


@pytest.mark.parametrize("sent", [b"", b"{", b"[]", b"7", b'"a"', b"\xff"])
def test_what_is_no_request_is_refused(http: httpx.Client, sent: bytes) -> None:
    assert error_of(post(http, sent), 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize("model", ["gpt-5", "words:gpt-5", "other:a", "", "x" * 9000])
def test_an_unknown_model_is_404_as_the_client_knows_it(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.embeddings.create(model=model, input="a")
    assert (refused.value.code, refused.value.param, refused.value.type) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )
    assert "there are words, words:a, words:b" in str(refused.value)
    assert len(str(refused.value)) < 500


def test_an_excluded_variant_is_not_ready(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="excluded: its cosine") as refused:
        client.embeddings.create(model="poor", input="a")
    assert refused.value.status_code == 503


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [
        (["a" * 1000] * 90 + [7], 400, "input[90]: expected a text"),
        ([[]] * 50_000, 413, "50000 rows are more than"),
        (["a"] * 40_000, 413, "40000 rows are more than"),
        ([7] * 50_000, 400, "input holds token ids"),
        ({"a": ["a" * 100_000]}, 400, "input: expected a text"),
    ],
    ids=["a number", "lists", "texts", "ids", "an object"],
)
def test_a_large_body_is_refused_as_a_small_one_is(http: httpx.Client, sent: Any, status: int, said: str) -> None:
    """It is parsed apart from the loop."""
    body = orjson.dumps({"model": "words", "input": sent})
    assert len(body) > embeddings.MEDIUM
    error = error_of(post(http, body), status)
    assert said in error["message"]


def test_a_large_body_is_answered_as_a_small_one_is(http: httpx.Client) -> None:
    body = {"model": "words", "input": ["a b"], "encoding_format": "float"}
    large = orjson.dumps(body) + b" " * embeddings.MEDIUM
    assert post(http, large).json()["data"] == post(http, body).json()["data"]


def test_where_nothing_serves_a_large_body_is_told_so_as_a_small_one_is(tmp_path: Path) -> None:
    with live_texts(tmp_path, model_control="explicit") as live, httpx.Client(base_url=f"http://{live.http}") as http:
        assert http.post("/v2/repository/models/words/unload", json={}).status_code == 200
        for padding in (0, embeddings.MEDIUM):
            error = error_of(post(http, b'{"model": "words", "input": "a"}' + b" " * padding), 503)
            assert error["code"] == "not_ready"


def test_too_large_is_413(http: httpx.Client) -> None:
    assert error_of(post(http, {"model": "words", "input": "a" * 150_000}), 413)["code"] == "body_too_large"
    assert error_of(post(http, {"model": "words", "input": "a" * 250_000}), 413)["code"] == "body_too_large"


def test_bodies_may_be_compressed(http: httpx.Client) -> None:
    from leanserve.http.content_encoding import compress

    body = compress(orjson.dumps({"model": "words", "input": "a"}), "gzip")
    assert post(http, body, **{"content-encoding": "gzip"}).status_code == 200
    assert error_of(post(http, body, **{"content-encoding": "br"}), 415)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("verb", "path", "allow"),
    [("GET", "/v1/embeddings", "POST"), ("POST", "/v1/models", "GET, HEAD"), ("DELETE", "/v1/models/a", "GET, HEAD")],
)
def test_another_verb_is_refused(live: Live, http: httpx.Client, verb: str, path: str, allow: str) -> None:
    counted = live.fleet.metrics.unrouted.requests["method_not_allowed"]
    before = counted.count
    reply = http.request(verb, path)
    assert error_of(reply, 405)["code"] == "method_not_allowed"
    assert reply.headers["allow"] == allow
    assert counted.count == before + (path == "/v1/embeddings")


NAMES = ["words", "a", "words:a", "b", "words:b", "held", "words:held"]


def test_the_client_of_openai_lists_what_it_may_ask_for(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == NAMES
    assert {(model.object, model.owned_by) for model in models} == {("model", "leanserve")}
    assert all(abs(model.created - time.time()) < 3600 for model in models)
    for model in models:
        assert client.models.retrieve(model.id) == model
        answered = client.embeddings.create(model=model.id, input="a").model
        assert answered in ({"a", "b"} if model.id == "words" else {model.id.removeprefix("words:")})


def test_an_unknown_model_is_not_retrieved(client: openai.OpenAI) -> None:
    for model in ("gpt-5", "words:gpt-5", "words/a", "a/b"):
        with pytest.raises(openai.NotFoundError) as refused:
            client.models.retrieve(model)
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
        assert "there are words, words:a, words:b" in str(refused.value)
    with pytest.raises(openai.InternalServerError, match="excluded: its cosine"):
        client.models.retrieve("words:poor")


def test_models_are_described_by_head_too(http: httpx.Client) -> None:
    assert http.head("/v1/models").headers["content-length"] == str(len(http.get("/v1/models").content))
    assert error_of(http.get("/v1/models/"), 404)["code"] == "model_not_found"
    assert http.get("/v1/models?limit=1").status_code == 200


def test_a_full_queue_is_a_rate_limit_with_its_time(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("full")
    with live_texts(folder, batch={"max_rows": 1, "queue_rows": 1}) as live:
        url, held = f"http://{live.http}/v1/embeddings", {"model": "held", "input": "a"}
        live.gate.clear()
        with ThreadPoolExecutor(6) as callers:
            pending = [callers.submit(httpx.post, url, json=held, timeout=30) for _ in range(6)]
            done, waiting = wait(pending, 20, FIRST_COMPLETED)
            reply = done.pop().result()
            assert waiting
            live.gate.set()
        error = error_of(reply, 429)
        assert int(reply.headers["retry-after"]) >= 1
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")


@pytest.mark.parametrize("texts", [["a"] * 9, ["a", "a b c d e f g h i j k l m n o p q r"] * 5], ids=["one", "two"])
def test_more_texts_than_may_wait_at_all_are_a_mistake(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    """One group of similar length or several: to send them again would not help."""
    with live_texts(tmp_path_factory.mktemp("many"), batch={"queue_rows": 8}) as live:
        reply = httpx.post(f"http://{live.http}/v1/embeddings", json={"model": "words", "input": texts}, timeout=30)
        assert f"{len(texts)} rows" in error_of(reply, 400)["message"]


def test_requests_count_for_the_variant_that_answered(live: Live, http: httpx.Client) -> None:
    counted = live.fleet.metrics.variants["b"].requests
    before = {outcome: counted[outcome].count for outcome in ("ok", "body_too_large")}
    post(http, {"model": "b", "input": "a"})
    post(http, {"model": "b", "input": "a" * 150_000})
    assert {outcome: counted[outcome].count - before[outcome] for outcome in before} == {"ok": 1, "body_too_large": 1}


def test_a_base_of_images_gives_no_embeddings() -> None:
    with live_server() as pixels, httpx.Client(base_url=f"http://{pixels.http}") as http:
        error = error_of(post(http, {"model": "pixels", "input": "a"}), 404)
        assert "the base 'pixels' gives no embeddings of texts" in error["message"]
        assert not {"/v1/embeddings", "/v1/models/{model}"} & set(http.get("/openapi.json").json()["paths"])
        assert http.get("/v1/models").json() == {"object": "list", "data": []}
        assert "gives no embeddings of texts" in error_of(http.get("/v1/models/pixels"), 404)["message"]
        asked = pixels.service.config.model_copy(update={"embeddings": EmbeddingsConfig(token_ids="own")})
        with pytest.raises(ConfigError, match=r"embeddings.token_ids: the base 'pixels' gives no embeddings of texts"):
            embeddings.embeddings_endpoint(pixels.service._replace(config=asked))


def test_the_api_describes_itself(http: httpx.Client) -> None:
    schema = body_of(http, "/v1/embeddings")
    assert schema["required"] == ["input", "model"]
    assert post(http, schema["example"]).status_code == 200
    assert len(schema["properties"]["input"]["anyOf"]) == 2, "no token ids unless the config says so"
    assert schema["properties"]["model"]["enum"] == NAMES


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=5))
def test_any_texts_are_answered(http: httpx.Client, texts: list[str]) -> None:
    reply = post(http, {"model": "a", "input": texts})
    assert reply.status_code == 200, reply.text
    assert len(reply.json()["data"]) == len(texts)


KEYS = st.sampled_from(["input", "model", "encoding_format", "dimensions", "user", "x"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["words", "a", "float", "base64"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=6,
)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(KEYS, VALUES))
def test_any_request_is_answered_or_refused(http: httpx.Client, request: dict[str, Any]) -> None:
    reply = post(http, request)
    if reply.status_code != 200:
        assert error_of(reply, reply.status_code)["type"] == "invalid_request_error"
        assert reply.status_code in {400, 404}
