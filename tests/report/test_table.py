"""The report: the right variant is named, and the terminal hides nothing at any width."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from leanserve.artifacts.manifest import Manifest, VariantReport
from leanserve.report.columns import amount, duration, milliseconds, ratio, speed
from leanserve.report.headline import headline
from leanserve.report.summary import HourlyPrice, summarise
from leanserve.report.table import print_table, write_html
from report_samples import HOSTILE, NO_CLASSES, a_few, artifact, changed, classes, embedding, values, variant


def printed(reports: list[VariantReport], width: int) -> str:
    console = Console(file=StringIO(), width=width, force_terminal=True, color_system=None)
    print_table(reports, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


# The choice


def test_names_the_fastest_serving_variant_within_half_a_point() -> None:
    words = headline(summarise(a_few()))
    assert words.name == "int8"
    assert "5.00× the throughput of the base and 4.00× smaller on disk" in words.claim
    assert "0.30 points of score lost (98.70 %)" in words.claim
    assert "at most 0.5 points below" in words.rule


def test_with_a_price_of_the_machine_predictions_have_one() -> None:
    priced = summarise(a_few(), price=HourlyPrice(3.6, "EUR"))
    assert "2 EUR per million predictions (the base: 10)" in headline(priced).claim
    (column,) = set(speed(priced.measured, (), priced.price)) - set(speed(priced.measured, ()))
    assert [column.title, *map(column.cell, priced.measured[:3])] == ["EUR/M", "10", "5", "2"]
    assert "per million" not in headline(summarise(a_few())).claim


def test_says_when_the_sample_is_too_small_to_be_sure() -> None:
    assert "450 rows" in headline(summarise(a_few())).caution
    sure = changed(a_few(), {"score_low": 0.986})
    assert headline(summarise(sure)).caution == ""


def within(kind: str, gain: float, low: float, high: float, score: float = 0.99, **more: Any) -> Manifest:
    return artifact(kind, gain, score, speedup_low=low, speedup_high=high, **more)


def test_of_variants_that_are_equal_within_noise_the_one_with_the_better_answers_is_named() -> None:
    first = variant("first", within("cast", 5.1, 4.7, 5.5, score=0.986))
    second = variant("second", within("cast", 5.0, 4.6, 5.4, score=0.989))
    slower = variant("slower", within("cast", 4.0, 3.9, 4.1))
    words = headline(summarise([first, second, slower]))
    assert words.name == "second"
    assert "5.00× the throughput" in words.claim
    assert "Within noise first is as fast; its answers are the best." in words.claim
    sure = variant("second", within("cast", 5.0, 4.98, 5.02, score=0.989))
    apart = headline(summarise([variant("first", within("cast", 5.1, 5.08, 5.12, score=0.986)), sure]))
    assert apart.name == "first"
    assert "noise" not in apart.claim


def test_what_is_not_measurably_faster_than_the_base_is_no_gain() -> None:
    words = headline(summarise([variant("eager"), variant("same", within("cast", 1.05, 0.97, 1.2))]))
    assert words.name == ""
    assert "measurably faster" in words.claim


def test_a_disturbed_measurement_is_marked() -> None:
    reports = [variant("eager"), variant("int8", within("cast", 5.0, 2.0, 9.0, waited=0.87))]
    assert "threads waited 87% of a turn for a processor" in headline(summarise(reports)).caution
    text = printed(reports, 80)
    assert re.search(r"int8 .* 5\.00× +2\.00-9\.00× +87%", text)
    assert "waited" not in printed(a_few(), 80)


def test_what_the_gate_could_not_decide_is_printed() -> None:
    doubtful = variant("int8", artifact("cast", gain=2)).model_copy(update={"doubt": "the drop may be up to 0.02"})
    assert "serving; the drop may be up to 0.02" in printed([variant("eager"), doubtful], 200)


def test_a_pass_that_brings_no_speed_is_told() -> None:
    steps = (artifact("fold_bn", change="no gain"), artifact("cast", gain=0.8, change="slower"))
    waterfall = printed([variant("eager"), variant("odd", *steps)], 100).split("odd, pass by pass")[1]
    assert re.search(r"fold_bn .* 1\.00× +no gain", waterfall)
    assert re.search(r"cast .* 0\.80× +slower", waterfall)


def test_exactly_half_a_point_lost_still_counts() -> None:
    base = artifact(score=566 / 600)
    edge = variant("edge", artifact("cast", gain=2, score=563 / 600), base=base)
    over = variant("over", artifact("cast", gain=2, score=562 / 600), base=base)
    assert headline(summarise([edge])).name == "edge"
    assert headline(summarise([over])).name == ""


@pytest.mark.parametrize(
    ("reports", "claim"),
    [
        ([variant("eager")], "Only the uncompressed base"),
        ([variant("slow", artifact("cast", gain=0.8))], "faster than the base"),
        ([variant("wrong", artifact("cast", gain=3, score=0.5))], "still answers right"),
        ([variant("gone", artifact("cast", gain=3), state="excluded", reason="why")], "passed its gate"),
    ],
)
def test_keeps_the_base_where_no_variant_earns_the_title(reports: list[VariantReport], claim: str) -> None:
    words = headline(summarise(reports))
    assert words.name == ""
    assert claim in words.claim


def test_without_labels_the_same_answers_count() -> None:
    close = artifact("a", gain=2, score=None, outputs=(classes(0.996),))
    far = artifact("b", gain=3, score=None, outputs=(classes(0.99),))
    base = artifact(score=None, outputs=(classes(1.0),))
    words = headline(summarise([variant("close", close, base=base), variant("far", far, base=base)]))
    assert words.name == "close"
    assert "99.60 % agreement with the base" in words.claim


def test_without_classes_the_same_direction_counts() -> None:
    base = artifact(score=None, outputs=(embedding(1.0),))
    close = artifact("a", gain=2, score=None, outputs=(embedding(0.991),))
    far = artifact("b", gain=3, score=None, outputs=(embedding(0.989),))
    words = headline(summarise([variant("far", far, base=base), variant("close", close, base=base)]))
    assert words.name == "close"
    assert "99.10 % agreement with the base" in words.claim
    assert "mean cosine similarity of at least 0.99" in words.rule


def test_the_worst_output_decides_and_all_are_told() -> None:
    def made(kind: str | None, gain: float, error: float) -> Manifest:
        return artifact(kind, gain, None, outputs=(classes(1 - error / 100), values(error)))

    base = made(None, 1, 0)
    reports = [variant("v2", made("cast", 2, 0.03), base=base), variant("v3", made("cast", 3, 0.7), base=base)]
    words = headline(summarise(reports))
    assert words.name == "v2"
    assert "97.00 % agreement with the base" in words.claim
    assert "at least 95 %" in words.rule
    text = printed(reports, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"^ *v3 +boxes +values +30.00 % +30.00 % +– +70.00 %", text, flags=re.MULTILINE)
    assert re.search(r"^ *v3 +logits +logits +99.30 % +99.30 % +0.0123 +–", text, flags=re.MULTILINE)
    assert "output by output" not in printed(a_few(), 100)


def test_a_score_says_nothing_of_the_outputs_without_labels() -> None:
    near = artifact("cast", gain=2, outputs=(classes(0.99), values(0.04)))
    far = artifact("cast", gain=3, outputs=(classes(0.99), values(0.06)))
    base = artifact(outputs=(classes(1.0), values(0.0)))
    words = headline(summarise([variant("near", near, base=base), variant("far", far, base=base)]))
    assert words.name == "near"
    assert "at most 0.5 points below" in words.rule
    assert "its worst output agrees with that of the base to at least 95 %" in words.rule


def test_the_base_is_put_beside_variants_that_all_have_passes() -> None:
    summary = summarise([variant("int8", artifact("cast"))])
    assert [item.name for item in summary.variants] == ["base (digits)", "int8"]
    assert summary.variants[0].state == "reference"
    assert summarise(a_few()).variants[0].name == "eager"


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="build at least one variant"):
        print_table([], Console())
    with pytest.raises(ValueError, match="build at least one variant"):
        write_html([], tmp_path / "report.html", "empty")
    assert not (tmp_path / "report.html").exists()


# The terminal


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_tables_show_every_number_uncut(width: int) -> None:
    text = printed(a_few(), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for cell in (
        *("98.70 [97.70, 99.30]", "0.30 (0.30)", "99.45 %", "0.0123"),
        *("1.20 MB", "1.19 M", "148 M", "64.0 MB", "7.5 s"),
        *("2.00", "16.0", "64.0", "500", "5.00×"),
        *("Test CPU 3000, 2 threads, avx2 avx512_vnni", "torch 2.13.0"),
    ):
        assert cell in text, cell


def test_long_numbers_leave_room_for_names() -> None:
    sure = {"score": 1.0, "score_low": 0.995, "score_high": 1.0, "drop_high": 0.005, "waited": 0.8}
    text = printed(changed(a_few(), sure), 80)
    assert max(map(len, text.splitlines())) <= 82, "four characters of every name"
    for cell in ("100.00 [99.50, 100.00]", "0.50)", "80%"):
        assert re.search(rf"^ int8 .*{re.escape(cell)}", text, flags=re.MULTILINE), cell


def test_in_a_file_names_are_whole() -> None:
    file = StringIO()
    print_table(a_few(), Console(file=file, width=40))
    lines = [line for line in file.getvalue().splitlines() if line.startswith(" pruned ")]
    assert any("%" in line for line in lines)
    assert "fold_bn " in file.getvalue()


def test_an_excluded_variant_is_printed_with_its_reason() -> None:
    text = printed(a_few(), 200)
    assert "excluded: agreement 99.45 % is below min_agreement 99.9 %" in text
    assert "prune_magnitude (simulated)" in text


def test_the_waterfall_has_a_row_for_every_prefix() -> None:
    waterfall = printed(a_few(), 100).split("int8, pass by pass")[1].split("pass by pass")[0]
    gains = re.findall(r"^ *(base|fold_bn|quantize_static) .* (\d\.\d\d)× ", waterfall, flags=re.MULTILINE)
    assert gains == [("base", "1.00"), ("fold_bn", "1.10"), ("quantize_static", "5.00")]


def test_markup_in_a_name_is_printed_as_it_is() -> None:
    text = printed([variant(HOSTILE, artifact("cast", gain=2))], 200)
    assert text.count(HOSTILE) == 7  # the verdict, five tables and the heading of the waterfall


def test_unmeasured_columns_are_left_out() -> None:
    text = printed(changed(a_few(), NO_CLASSES), 100)
    assert "ranks" in text
    assert "score %" not in text
    assert "–" not in text


def test_different_machines_are_called_out() -> None:
    elsewhere = artifact("cast", gain=2, cpu="Other CPU", threads=8)
    text = printed([variant("eager"), variant("cast", elsewhere)], 100)
    assert "different machines" in text
    assert "Other CPU, 8 threads" in text


# The numbers


def test_numbers_read_well_at_every_magnitude() -> None:
    assert [amount(value, "B") for value in (0, 999, 999_600, 4_800_000, 2.5e9)] == [
        *("0 B", "999 B", "1.00 MB", "4.80 MB", "2.50 GB")
    ]
    assert [milliseconds(value) for value in (0.0421, 0.9996, 9.996, 99.96, 1234.5)] == [
        *("0.042", "1.00", "10.0", "100", "1,234")
    ]
    assert [ratio(value) for value in (0.5, 4.2, 11.11)] == ["0.50×", "4.20×", "11.1×"]
    assert [duration(value) for value in (0.04, 92.5, 119.99, 3599.7)] == ["0.0 s", "92.5 s", "120.0 s", "60 min 0 s"]
