"""The page of the report: it hides nothing, and it is one safe, valid, self-contained file."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from leanserve.artifacts.manifest import VariantReport
from leanserve.report.table import write_html
from report_samples import HOSTILE, NO_CLASSES, UNLABELLED, a_few, artifact, changed, classes, values, variant


def page(reports: list[VariantReport], folder: Path, title: str = "digits") -> str:
    path = folder / "made" / "report.html"
    write_html(reports, path, title)
    return path.read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Checks that every element is closed in order, and keeps what the tests ask about."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_says_what_the_tables_say(tmp_path: Path) -> None:
    outline = Outline(page(a_few(), tmp_path, "digits on a laptop"))
    rows = {row[0].split()[-1]: row[1:] for row in outline.rows[1:6]}
    assert rows["int8"] == ["98.70 [97.70, 99.30]", "0.30 (0.30)", "99.45 %", "99.45 %", "0.0123", "1e-06"]
    assert rows["sparse"][1] == "0.00 (0.00)"
    for words in (
        *("digits on a laptop", "int8 is the cheapest variant that still answers right", "A variant answers right if"),
        *("agreement 99.45 % is below min_agreement 99.9 %", "prune_magnitude (simulated)", "nodes_quantized 22"),
        *('keep_float=["head"]', "Test CPU 3000, 2 threads, avx2 avx512_vnni", "torch 2.13.0", "450 rows"),
    ):
        assert words in outline.text, words


def test_every_plot_and_table_tells_what_it_shows(tmp_path: Path) -> None:
    outline = Outline(page(a_few(), tmp_path))
    labels = [attributes["aria-label"] or "" for tag, attributes in outline.tags if tag == "svg"]
    assert len(labels) == 2 + 4  # accuracy against latency, sizes, and a waterfall for each variant with passes
    assert "int8 98.70 % at 2.00 ms" in labels[0]
    assert "int8 1.20 MB" in labels[1]
    assert "after quantize_static 5.00× the throughput at 98.70 %" in labels[3]
    tags = [tag for tag, _ in outline.tags]
    assert tags.count("caption") == tags.count("table") == 3 + 4


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    text = page(a_few(), tmp_path)
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    outline = Outline(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in outline.tags}
    references = [attributes.get("href") or "#" for _, attributes in outline.tags]
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {reference[1:] for reference in references} - {""} <= set(ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)


def test_plots_use_the_colours_of_the_page_in_both_themes(tmp_path: Path) -> None:
    text = page(a_few(), tmp_path)
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    declared = set(re.findall(r"(--\w+):", text))
    assert "prefers-color-scheme: dark" in text
    assert set(re.findall(r"var\((--\w+)\)", drawn)) <= declared
    assert not re.findall(r"(?:fill|stroke): #", drawn)


def test_hostile_names_and_reasons_are_escaped(tmp_path: Path) -> None:
    report = variant(HOSTILE, artifact("cast", gain=2), state="excluded", reason=f"because {HOSTILE}")
    text = page([report], tmp_path, f"title {HOSTILE}")
    assert "<script" not in text
    outline = Outline(text)
    assert f"because {HOSTILE}" in outline.text
    assert f"title {HOSTILE}" in outline.text


def test_a_dollar_in_a_name_is_not_mathematics(tmp_path: Path) -> None:
    text = page([variant("$x^2$", artifact("cast", gain=2))], tmp_path)
    assert re.search(r"<text[^>]*>1 \$x\^2\$</text>", text)


@pytest.mark.parametrize(
    ("missing", "claim"),
    [(UNLABELLED, "No compressed variant still answers right"), (NO_CLASSES, "pruned is the cheapest variant")],
    ids=["no labels", "no classes"],
)
def test_a_model_without_labels_has_a_page(tmp_path: Path, missing: dict[str, None], claim: str) -> None:
    outline = Outline(page(changed(a_few(), missing), tmp_path))
    assert claim in outline.text
    assert "score %" not in outline.text
    assert "None" not in outline.text
    assert "agreement 99.45 % is below min_agreement" in outline.text


def test_every_output_has_a_row(tmp_path: Path) -> None:
    two = changed(a_few(), {"outputs": (classes(0.9), values(1.7)), "agreement": 0.0})
    rows = [[" ".join(cell.split()) for cell in row] for row in Outline(page(two, tmp_path)).rows]
    assert ["5 sparse", "boxes", "values", "0.00 %", "0.00 %", "–", "170.00 %"] in rows


def test_a_single_variant_has_a_page(tmp_path: Path) -> None:
    outline = Outline(page([variant("eager")], tmp_path))
    assert "Only the uncompressed base was measured" in outline.text
    assert "Pass by pass" not in outline.text


def test_many_long_and_foreign_names_have_a_page(tmp_path: Path) -> None:
    names = [f"数字-{number}-" + "pruned-and-distilled-" * 4 for number in range(20)]
    outline = Outline(page([variant(name, artifact("cast", gain=2)) for name in names], tmp_path))
    assert all(name in outline.text for name in names)


def test_the_same_reports_give_the_same_bytes(tmp_path: Path) -> None:
    assert page(a_few(), tmp_path) == page(a_few(), tmp_path)


def test_what_a_pass_found_out_stands_there_as_a_table(tmp_path: Path) -> None:
    rows = [
        {"layer": "stem/<Conv>", "SQNR, dB": 12.345678, "KL, nats": 0.25, "kept": "float"},
        {"layer": "head/Gemm", "SQNR, dB": 40.0, "KL, nats": None, "kept": "int8"},
    ]
    chosen = artifact("quantize_select", 2.0, 0.98, decisions={"float_layers": ["stem"], "tables": {"layers": rows}})
    outline = Outline(page([variant("float"), variant("int8", chosen)], tmp_path))
    assert ["layer", "SQNR, dB", "KL, nats", "kept"] in outline.rows
    assert ["stem/<Conv>", "12.35", "0.25", "float"] in outline.rows
    assert ["head/Gemm", "40", "–", "int8"] in outline.rows


def test_the_way_between_two_parents_is_drawn_where_a_pass_has_looked(tmp_path: Path) -> None:
    curves = {"before": [0.1, 0.9, 1.4, 0.8, 0.2], "after": [0.1, 0.11, 0.12, 0.15, 0.2]}
    joined = variant("joined", artifact("rebasin", decisions={"curves": curves}))
    drawn, without = page([variant("eager"), joined], tmp_path), page(a_few(), tmp_path)
    assert "joined, rebasin: loss from the first to the second parent: before 0.1, 0.9, 1.4, 0.8, 0.2; after" in drawn
    assert "second parent" in " ".join(Outline(drawn).words)
    assert "loss from the first" not in without
