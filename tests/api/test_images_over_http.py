"""Images as people send them: by curl, by browsers' forms, from JSON; decoded off the event loop."""

from __future__ import annotations

import base64
import shutil
import subprocess
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from PIL import Image, features

from fakes import Live, live_server
from leanserve.contracts import Decoded, Weighed


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server() as server:
        yield server


def image(brightest: int, form: str = "PNG") -> bytes:
    """An image of the class `brightest`; four pixels, each of which a JPEG sees as a block of 8 x 8."""
    small = Image.new("L", (2, 2))
    small.putpixel((brightest % 2, brightest // 2), 255)
    stream = BytesIO()
    small.resize((16, 16), Image.Resampling.NEAREST).save(stream, form)
    return stream.getvalue()


def post(live: Live, **request: Any) -> Any:
    reply = httpx.post(
        f"http://{live.http}/v1/predict", headers={"x-variant": "a"} | request.pop("headers", {}), **request
    )
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_form_with_one_file_gets_one_answer(live: Live) -> None:
    assert post(live, files={"file": ("photo.jpg", image(2, "JPEG"))})["label"] == "two"


def test_a_form_with_files_gets_a_list_of_answers(live: Live) -> None:
    files = [("a", ("1.png", image(1))), ("a", ("3.jpg", image(3, "JPEG"))), ("b", ("x", image(0)))]
    answer = post(live, files=files)
    assert [item["label"] for item in answer["predictions"]] == ["one", "three", "zero"]
    assert answer["variant"] == "a"


@pytest.mark.parametrize("form", ["WEBP", "AVIF", "GIF", "TIFF", "BMP"])
def test_every_format_is_answered_over_http(live: Live, form: str) -> None:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    body, media_type = image(2, form), f"image/{form.lower()}"
    assert post(live, content=body, headers={"content-type": media_type})["label"] == "two"
    assert post(live, files={"file": (f"x.{form}", body, media_type)})["label"] == "two"
    assert post(live, json={"inputs": f"data:{media_type};base64,{base64.b64encode(body).decode()}"})["label"] == "two"


@pytest.mark.parametrize("headers", [{}, {"content-type": "application/octet-stream"}, {"content-type": "image/*"}])
def test_a_body_without_a_certain_type_is_recognised(live: Live, headers: dict[str, str]) -> None:
    assert post(live, content=image(3), headers=headers)["label"] == "three"


def test_base64_in_json(live: Live) -> None:
    files = [{"b64": base64.b64encode(image(index)).decode()} for index in (2, 1)]
    assert post(live, json={"inputs": files[0]})["label"] == "two"
    assert [item["label"] for item in post(live, json={"inputs": files})["predictions"]] == ["two", "one"]


@pytest.mark.parametrize(
    ("request_", "status", "text"),
    [
        ({"files": {"f": ("note.txt", b"hello")}}, 400, "part 0 of the form (note.txt) is sent as text/plain"),
        (
            {"content": b"hello", "headers": {"content-type": "image/jpeg"}},
            400,
            "the body (5 bytes) is sent as image/jpeg, but does not",
        ),
        ({"content": b"hello"}, 400, "the body (5 bytes) begins like none of image/png, image/jpeg, image/webp"),
        ({"content": image(1)[:-30], "headers": {"content-type": "image/png"}}, 400, "cannot be decoded"),
        ({"content": b"hello", "headers": {"content-type": "text/plain"}}, 415, "is none of image/png, image/jpeg"),
        ({"json": {"inputs": {"b64": "?"}}}, 400, "inputs: not base64"),
    ],
    ids=["text in a form", "text as jpeg", "text", "truncated", "text/plain", "base64"],
)
def test_what_is_no_image_is_refused_with_the_reason(live: Live, request_: Any, status: int, text: str) -> None:
    reply = httpx.post(f"http://{live.http}/v1/predict", **request_)
    assert reply.status_code == status
    assert text in reply.json()["error"]


def test_curl_as_in_the_docs(live: Live, tmp_path: Path) -> None:
    """`curl -F` and `curl --data-binary`, which say differently what they send."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(image(2, "JPEG"))
    for arguments in (["-F", f"file=@{photo}"], ["--data-binary", f"@{photo}", "-H", "content-type: image/jpeg"]):
        command = ["curl", "-s", "-H", "x-variant: a", *arguments, f"http://{live.http}/v1/predict"]
        done = subprocess.run(command, capture_output=True, check=True)
        assert orjson.loads(done.stdout)["label"] == "two"


def test_the_openapi_page_offers_files(live: Live) -> None:
    schema = httpx.get(f"http://{live.http}/openapi.json").json()
    content = schema["paths"]["/v1/predict"]["post"]["requestBody"]["content"]
    file = {"type": "string", "format": "binary"}
    assert content["multipart/form-data"]["schema"]["properties"] == {"file": file}
    assert content["image/jpeg"]["schema"] == file
    assert set(content) == set(live.service.base.codec.media_types)


def test_images_are_decoded_off_the_event_loop(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    codec = live.service.base.codec

    class Watched:
        media_types, encode = codec.media_types, staticmethod(codec.encode)

        def prepare(self, media_type: str, body: bytes) -> Weighed[Decoded]:
            threads.append(threading.current_thread().name)
            return codec.prepare(media_type, body)

    for variant in live.fleet.variants.values():
        monkeypatch.setattr(variant, "codec", Watched())
    post(live, files={"file": ("photo.png", image(1))})
    assert [name.partition("_")[0] for name in threads] == ["decode"]
