"""Texts and pairs of texts in files: columns, labels, splits, batches, and errors that say where."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leanserve.bases.datasets.text_files import Line, read_lines
from leanserve.bases.datasets.texts import TextRows, open_texts
from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.text import TextCodec
from leanserve.config.data_section import TextData
from leanserve.contracts import ModelSpec, TensorSpec
from leanserve.errors import ConfigError
from tiny_checkpoints import WORDS, write_tokenizer

SPEC = ModelSpec(
    (TensorSpec("input_ids", "int64", (None,)), TensorSpec("attention_mask", "int64", (None,))),
    (TensorSpec("embedding", "float32", (4,), meaning="embedding"),),
)


@pytest.fixture
def codec(tmp_path: Path) -> TextCodec:
    return TextCodec(write_tokenizer(tmp_path / "tokenizer"), 6, AnswerEncoder(SPEC))


def opened(codec: TextCodec, folder: Path, labels: tuple[str, ...] = (), **declared: Any) -> TextRows:
    spec = replace(SPEC, labels=labels) if labels else SPEC
    return open_texts(TextData.model_validate(declared), spec, codec, folder)


def pairs(path: Path, first: int, count: int) -> Path:
    """Pairs like those of the STS benchmark, no two alike; the similarity is the number of the pair."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        for number in range(first, first + count):
            words = [WORDS[number % 23], WORDS[number // 23 % 23]]
            writer.writerow([f"the {', '.join(words)}", f'a "{words[0]}"', number])
    return path


def test_columns_of_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfid,said\r\n1,"two ""big"", red\r\ndogs"\r\n\r\n2,a cat\r\n')
    (tmp_path / "b.tsv").write_text("'tis a cat\t1\n\"not closed\t2\n")
    (tmp_path / "c.jsonl").write_text('{"said": "a\\ncat", "is": 1}\n\n["x", 2.5]\n')
    assert read_lines(tmp_path / "a.csv", ["said", 0]) == [
        Line(2, ('two "big", red\r\ndogs', "1")),
        Line(5, ("a cat", "2")),
    ]
    assert read_lines(tmp_path / "b.tsv", [0, 1]) == [Line(1, ("'tis a cat", "1")), Line(2, ('"not closed', "2"))]
    (tmp_path / "d.jsonl").write_text('["x", 2.5]')
    assert read_lines(tmp_path / "d.jsonl", [1]) == [Line(1, ("2.5",))]
    with pytest.raises(ConfigError, match=r"c.jsonl:3: no column of the name said; the line has 2 columns"):
        read_lines(tmp_path / "c.jsonl", ["said"])


@pytest.mark.parametrize(
    ("name", "content", "columns", "error"),
    [
        ("a.csv", b"x,y\n1,2\n", ["z"], r"a.csv:1: no column is called 'z'; the header has x, y"),
        ("a.csv", b"1,2\n3\n", [1], r"a.csv:2: no column of the number 1; the line has 1 columns"),
        ("a.csv", b'1,2\n"3"4,5\n', [0], r"a.csv:2: ',' expected after '\"'"),
        ("a.csv", b'1\n"open\n', [0], r"a.csv:2: unexpected end of data"),
        ("a.csv", b"1\n2\n\xff\n", [0], r"a.csv:3: not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1\n', ["a"], r"a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"a": null}\n', ["a"], r"a.jsonl:1: column a holds null, no text and no number"),
        ("a.jsonl", b'{"a": 1}\n', ["b"], r"a.jsonl:1: no column of the name b; the line has a"),
        ("a.jsonl", b"7\n", ["b"], r"a.jsonl:1: no column of the name b; the line has a value"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, name: str, content: bytes, columns: list[str | int], error: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=error):
        read_lines(tmp_path / name, columns)


def test_pairs_are_rows_that_stay_together(tmp_path: Path, codec: TextCodec) -> None:
    pairs(tmp_path / "sts.csv", 0, 100)
    splits = {"calibration": 10, "gate": 20, "test": 5}
    rows = opened(codec, tmp_path, texts="sts.csv", pair=1, label=2, splits=splits)
    assert rows.unit == 2
    assert {split: len(rows.split(split, None)) for split in ("calibration", "gate", "test", "train")} == {
        "calibration": 20,
        "gate": 40,
        "test": 10,
        "train": 130,
    }
    assert len(rows.split("gate", 7)) == 6
    seen = [batch.labels for split in splits for batch in rows.split(split, None).batches(8)]  # type: ignore[arg-type]
    assert len(set(np.concatenate([part for part in seen if part is not None]))) == 35
    for seed in (None, 1):
        batches = list(rows.split("gate", None).batches(8, shuffle_seed=seed))
        labels = np.concatenate([batch.labels for batch in batches if batch.labels is not None])
        np.testing.assert_array_equal(labels[::2], labels[1::2])
        for batch in batches:
            ids, mask = batch.inputs
            assert batch.labels is not None
            # The first word of a pair is in both of its texts: token 2 of `the W, V` is token 3 of `a " W "`.
            np.testing.assert_array_equal(ids[::2, 2], ids[1::2, 3])
            np.testing.assert_array_equal(ids[::2, 2], 4 + batch.labels[::2].astype(int) % 23)
            np.testing.assert_array_equal(mask, ids > 0)
    first = next(rows.split("gate", None).batches(40)).inputs[0]
    other = next(rows.split("gate", None).batches(40, shuffle_seed=1)).inputs[0]
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(np.sort(first[::2], axis=0), np.sort(other[::2], axis=0))


def test_batches_are_padded_to_their_own_longest_text_and_cut_at_the_model(tmp_path: Path, codec: TextCodec) -> None:
    lines = ["the cat", "a", "dog"] + [" ".join(WORDS[n : n + 2]) for n in range(5)] + [" ".join(WORDS)]
    (tmp_path / "gate.tsv").write_text("\n".join(lines))
    batches = list(opened(codec, tmp_path, texts={"gate": "gate.tsv"}).split("gate", None).batches(1))
    assert sorted(batch.inputs[0].shape[1] for batch in batches) == [3, 3, 4, 4, 4, 4, 4, 4, 6]
    assert all(batch.labels is None for batch in batches)


def test_classes_by_name_or_by_number(tmp_path: Path, codec: TextCodec) -> None:
    lines = [f'{{"text": "the {word}", "class": "{("bad", "good")[index % 2]}"}}' for index, word in enumerate(WORDS)]
    (tmp_path / "named.jsonl").write_text("\n".join(lines))
    (tmp_path / "numbered.csv").write_text("\n".join(f"the {word},{n % 2}" for n, word in enumerate(WORDS)))
    named = opened(codec, tmp_path, ("bad", "good"), texts="named.jsonl", text="text", label="class")
    numbered = opened(codec, tmp_path, ("bad", "good"), texts="numbered.csv", label=1)
    for rows in (named, numbered):
        for batch in rows.split("gate", None).batches(4):
            assert batch.labels is not None
            np.testing.assert_array_equal(batch.labels, batch.inputs[0][:, 2] % 2)
    (tmp_path / "numbered.csv").write_text("the cat,1\na dog,2\n")
    with pytest.raises(ConfigError, match=r"numbered.csv:2: column 1: '2' is no label of the model"):
        opened(codec, tmp_path, ("bad", "good"), texts={"gate": "numbered.csv"}, label=1).split("gate", None)


def test_truth_values_are_classes_and_numbers_the_targets_of_a_regression(tmp_path: Path, codec: TextCodec) -> None:
    lines = [
        f'{{"text": "the {word}", "good": {("false", "true")[n % 2]}, "stars": {n / 2}}}'
        for n, word in enumerate(WORDS)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    classes = opened(codec, tmp_path, ("bad", "good"), texts="a.jsonl", text="text", label="good")
    stars = replace(SPEC, outputs=(TensorSpec("stars", "float32", (1,)),))
    declared = TextData.model_validate({"texts": "a.jsonl", "text": "text", "label": "stars"})
    for rows, column in ((classes, "good"), (open_texts(declared, stars, codec, tmp_path), "stars")):
        for batch in rows.split("gate", None).batches(4):
            number = batch.inputs[0][:, 2] - 4
            assert batch.labels is not None
            np.testing.assert_array_equal(batch.labels, number % 2 if column == "good" else number / 2)
    named = TextData.model_validate({"texts": {"gate": "a.jsonl"}, "text": "text", "label": "text"})
    with pytest.raises(ConfigError, match=r"a.jsonl:1: column text: 'the .*' is no finite number; of a model without"):
        open_texts(named, stars, codec, tmp_path).split("gate", None)


def test_splits_with_files_of_their_own(tmp_path: Path, codec: TextCodec) -> None:
    pairs(tmp_path / "train.csv", 0, 30)
    pairs(tmp_path / "dev.csv", 100, 9)
    files = {"train": "train.csv", "gate": "dev.csv"}
    rows = opened(codec, tmp_path, texts=files, pair=1, label=2, splits={"calibration": 10})
    labels = next(rows.split("gate", None).batches(99)).labels
    assert labels is not None
    assert set(labels) == set(range(100, 109))
    assert (len(rows.split("calibration", None)), len(rows.split("train", None))) == (20, 40)
    assert len(rows.split("test", None)) == 0
    assert list(rows.split("test", None).batches(8)) == []
    pairs(tmp_path / "dev.csv", 29, 9)
    with pytest.raises(ConfigError, match=r"data.texts: 1 rows of gate are also in another split.*line 1 .*line 30"):
        opened(codec, tmp_path, texts=files, pair=1, label=2).split("gate", None)


def test_the_digest_follows_texts_columns_and_tokenizer(tmp_path: Path, codec: TextCodec) -> None:
    pairs(tmp_path / "sts.csv", 0, 30)
    digests = [
        opened(codec, tmp_path, texts="sts.csv", pair=1, label=2).digest,
        opened(codec, tmp_path, texts="sts.csv", pair=1).digest,
        opened(codec, tmp_path, texts="sts.csv", pair=1, label=2, seed=1).digest,
    ]
    same = tmp_path / "elsewhere"
    same.mkdir()
    pairs(same / "sts.csv", 0, 30)
    assert opened(codec, same, texts="sts.csv", pair=1, label=2).digest == digests[0]
    pairs(tmp_path / "sts.csv", 1, 30)
    digests.append(opened(codec, tmp_path, texts="sts.csv", pair=1, label=2).digest)
    codec.tokenizer.write_text(codec.tokenizer.read_text().replace('"film"', '"movie"'))
    digests.append(opened(codec, tmp_path, texts="sts.csv", pair=1, label=2).digest)
    assert len(set(digests)) == 5


def test_what_does_not_suit_the_model_is_refused_at_once(tmp_path: Path, codec: TextCodec) -> None:
    (tmp_path / "a.csv").write_text("x,1\n")
    with pytest.raises(ConfigError, match=r"data.texts: there is no file .*b.csv"):
        opened(codec, tmp_path, texts="b.csv")
    with pytest.raises(ConfigError, match=r"data.texts.gate: .*a.xls is none of .csv, .tsv, .jsonl"):
        opened(codec, tmp_path, texts={"gate": "a.xls"})
    with pytest.raises(ConfigError, match=r"data.pair: the model classifies single texts"):
        opened(codec, tmp_path, ("bad", "good"), texts="a.csv", pair=1)
    with pytest.raises(ConfigError, match=r"data.label: the rows have labels, .* neither classes with names"):
        opened(codec, tmp_path, texts="a.csv", label=1)
    (tmp_path / "p.csv").write_text("x,y,3\nx,z,high\n")
    with pytest.raises(ConfigError, match=r"p.csv:2: column 2: 'high' is no finite number"):
        opened(codec, tmp_path, texts={"gate": "p.csv"}, pair=1, label=2).split("gate", None)
