"""The config section `data:`: the rows from which calibration, training, gate and test draw.

One form per kind of file; the first key names the form. Rows are cut into splits that share none: either one source is
shuffled and cut by `splits`, or every split has its own files. Rows with equal content never land in two splits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, Tag

from leanserve.config.section import Form, Section, told_by_key
from leanserve.contracts import Split

Files = Path | dict[Split, Path]
"""One source for all splits, or one per split."""


class SplitSizes(Section):
    """Rows per split of a single source, taken in this order from its shuffled rows; `train` gets what is left."""

    calibration: int = Field(128, ge=1)
    gate: int = Field(512, ge=1)
    test: int = Field(0, ge=0)


class _OwnData(Form):
    splits: SplitSizes | None = Field(None, description="rows per split; a smaller source is cut in proportion")
    seed: int = Field(0, ge=0, lt=2**32, description="of the shuffle before the cut")


class ImageData(_OwnData):
    """Folders of image files."""

    kind: ClassVar[str] = "images"
    images: Files = Field(description="a folder, or one per split")
    label: Literal["auto", "folder", "prefix", "none"] = Field(
        "auto",
        description="of an image: its folder's name, the number its name begins with; auto: folder if there are",
    )


class ArrayFileData(_OwnData):
    """One `.npz` file with arrays of equal length."""

    kind: ClassVar[str] = "arrays"
    arrays: Files = Field(description="the file, or one per split")
    inputs: str | dict[str, str] | None = Field(
        None, description="name of the array, or per input of the model; by default the model's own names"
    )
    labels: str | None = Field(None, description="name of the array of labels; none: unlabelled")


class TextData(_OwnData):
    """CSV, TSV or JSONL with one text, or a pair of texts, per line."""

    kind: ClassVar[str] = "texts"
    texts: Files = Field(description="the file, or one per split; its ending tells the format")
    text: str | int = Field(0, description="column: a name, or a number from 0 for files without a header")
    pair: str | int | None = Field(None, description="column of the second text of a pair")
    label: str | int | None = Field(None, description="column of the class, or of the similarity of a pair")


class TableData(_OwnData):
    """CSV, TSV or JSONL with numbers and words in columns, for a model that takes arrays."""

    kind: ClassVar[str] = "table"
    table: Files = Field(description="the file, or one per split; its ending tells the format")
    inputs: dict[str, str | int | tuple[str | int, ...]] = Field(
        default_factory=dict,
        description="column, or columns in order, per input of the model; by default columns of the inputs' names",
    )
    label: str | int | None = Field(None, description="column of the class, or of the number that should be answered")


class SoundData(_OwnData):
    """Recordings as WAV or FLAC, in folders or named by a table."""

    kind: ClassVar[str] = "sounds"
    sounds: Files = Field(
        description="a folder, or a .csv, .tsv or .jsonl that names files from its own folder on; or one per split"
    )
    file: str | int = Field("file", description="column of a table: the path of a recording")
    label: str | int = Field(
        "auto",
        description="of a recording: its folder's name (folder), a column of the table, or none; auto: folder if there "
        "are, and of a table none",
    )


class SyntheticData(Form):
    """Random rows that fit the model: for a first look at speed, worthless for calibration and for quality."""

    kind: ClassVar[str] = "synthetic"
    synthetic: int = Field(ge=8, le=100_000, description="number of rows per split")


DATA_FORMS: tuple[type[Form], ...] = (ImageData, ArrayFileData, TableData, TextData, SoundData, SyntheticData)


AnyData = Annotated[
    Annotated[ImageData, Tag("data.images")]
    | Annotated[ArrayFileData, Tag("data.arrays")]
    | Annotated[TableData, Tag("data.table")]
    | Annotated[TextData, Tag("data.texts")]
    | Annotated[SoundData, Tag("data.sounds")]
    | Annotated[SyntheticData, Tag("data.synthetic")],
    told_by_key("data", DATA_FORMS, "data is"),
]
