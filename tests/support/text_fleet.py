"""A base of texts with a tokenizer of twelve words, and variants that tell what they read: for tests of text APIs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from fakes import Live, Opened, PixelBase, planned, serving
from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.text import TextCodec
from leanserve.config.schema import ServiceConfig
from leanserve.contracts import Arrays, ModelSpec, Result, TensorSpec
from leanserve.runtime.device import Device
from leanserve.serving.short_batches import SHORT_S

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "one", "two", "three", "four", "five"]
CLS, SEP, A, B = 2, 3, 4, 5
FATAL = WORDS.index("five")
FIELDS = (TensorSpec("input_ids", "int64", (None,)), TensorSpec("attention_mask", "int64", (None,)))
SPEC = ModelSpec(FIELDS, (TensorSpec("embedding", "float32", (4,), meaning="embedding"),))
MAX_LENGTH = 64


def tokenizer_file(folder: Path) -> Path:
    """A `tokenizer.json` that splits at spaces and punctuation, and puts a text between [CLS] and [SEP]."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    tokenizer.enable_padding(length=20)  # as files of real models have it; a server pads by itself
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def embedded(ids: list[int]) -> list[float]:
    """What `ReadingBackend` answers for a row."""
    return [len(ids), sum(ids), ids[0], ids[-1] / 7]


class ReadingBackend:
    """Embeds a row as its number of tokens, their sum, the first and a seventh of the last; padding is not read."""

    name = "reading"
    self_contained = False
    device = "cpu"
    row_buckets: tuple[int, ...] = ()

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.gate = gate

    def run(self, batch: Arrays) -> Result:
        if self.gate is not None:
            assert self.gate.wait(20)
            time.sleep(2 * SHORT_S)  # work for a lane: the event loop must not wait at the gate
        ids, mask = batch
        if (ids == FATAL).any():
            raise RuntimeError("secret detail")
        rows = [embedded(row[shown == 1].tolist()) for row, shown in zip(ids, mask, strict=True)]
        return Result((np.array(rows, np.float32),))

    def close(self) -> None:
        """Holds nothing."""


def text_fleet(folder: Path, gate: threading.Event, spec: ModelSpec = SPEC, **changes: Any) -> Opened:
    """`a` and `b` answer, `held` waits for the gate to open, `poor` is excluded by its gate. `five` is a fatal word."""
    names = ("a", "b", "held", "poor")
    settings = {
        "base": "words",
        "variants": [{"name": name} for name in names],
        "traffic": {"weights": {"a": 1, "b": 1}},
    }
    config = ServiceConfig.model_validate(settings | {"drain": {"delay_s": 0, "timeout_s": 5}} | changes)
    base = PixelBase()
    base.name, base.spec = "words", spec
    base.codec = TextCodec(tokenizer_file(folder), MAX_LENGTH, AnswerEncoder(spec))
    opened = planned(config, base, Device("cpu", 1), {"poor": "its cosine is 0.5"})
    for name in names[:3]:
        backend = ReadingBackend(gate if name == "held" else None)
        opened.warm.open(name, lambda threads, backend=backend: backend)  # type: ignore[misc]
    return opened


@contextmanager
def live_texts(folder: Path, **changes: Any) -> Iterator[Live]:
    """HTTP on a free port over a `text_fleet`."""
    gate = threading.Event()
    gate.set()
    with serving(text_fleet(folder, gate, **changes), gate) as live:
        yield live
