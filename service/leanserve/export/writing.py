"""Writes a built variant into a folder: the model, what it takes and gives as JSON, a page, and a script that runs it.

What leaves the house must not need it: the script asks for numpy and the library of the format alone. A torch module is
written as ONNX unless asked otherwise; as torch it is a program of torch.export, with its weights once more as
safetensors for those who have the class.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, cast, get_args

import jinja2

from leanserve import __version__
from leanserve.artifacts.load import load_model
from leanserve.artifacts.manifest import VariantReport
from leanserve.codecs.images import ImageCodec
from leanserve.codecs.text import TextCodec
from leanserve.contracts import Codec, Json, Model, ModelSpec, OnnxModel, RowsTogether, TorchModel
from leanserve.errors import PassFailed, StartupError
from leanserve.runtime.formats import format_named

if TYPE_CHECKING:
    from collections.abc import Iterator

    from leanserve.context import AppContext

ExportForm = Literal["onnx", "torch", "openvino"]
LIBRARIES: Final[Mapping[ExportForm, str]] = {"onnx": "onnxruntime", "torch": "torch", "openvino": "openvino"}
"""What the script imports beside numpy; also their names on the package index."""
TOGETHER: Final[Mapping[RowsTogether, str]] = {
    "any": "Rows of a batch keep out of each other.",
    "one_length": "Only rows of equal length may share a batch: padding changes the answers.",
    "one": "Give it one row at a time: rows of a batch would change each other, or the model takes no more.",
}
TEMPLATES = Path(__file__).parent


class _Made(NamedTuple):
    """The file that is run, and all files with what they are."""

    form: ExportForm
    file: str
    files: tuple[tuple[str, str], ...]
    precision: str = "f32"
    """In which OpenVINO is to compute."""


def export_variant(work: AppContext, name: str, folder: Path, wanted: ExportForm | None) -> tuple[str, ...]:
    """Write a variant into an empty folder; the names of the files. `None` stands for what it is served from, or ONNX.

    Raises:
        StartupError: there is no such variant, it could not be made, it does not become what is wanted, or the folder
            has something in it.
    """
    report = _report(work, name)
    if folder.is_dir() and any(folder.iterdir()):
        raise StartupError(f"{folder} is not empty; export into a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    model = load_model(work.store, work.base, report.ancestry[-1].key)
    form = wanted or ("openvino" if model.format == "openvino" else "onnx")
    with _refusing(folder, name, form):
        made = WRITERS[form](model, folder, work.threads)
    codec = work.base.codec_for(report.spec)
    files = [*made.files]
    if isinstance(codec, TextCodec):
        shutil.copyfile(codec.tokenizer, folder / "tokenizer.json")
        files.append(("tokenizer.json", "how a text becomes token ids (the library tokenizers reads it)"))
    files += [("config.json", "what it takes and gives, and how it was made"), ("run.py", "runs it")]
    told = _config(work, report, made, codec)
    (folder / "config.json").write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for template in ("run.py", "README.md"):
        text = _rendered(template, work, report, made, files)
        (folder / template).write_text(text, encoding="utf-8")
    return (*(file for file, _ in files), "README.md")


def _report(work: AppContext, name: str) -> VariantReport:
    reports = {report.name: report for report in work.reports()}
    if name not in reports:
        raise StartupError(f"there is no variant '{name}'; there are {', '.join(reports)}")
    if not reports[name].built:
        raise StartupError(f"variant '{name}' could not be made: {reports[name].reason}")
    return reports[name]


@contextmanager
def _refusing(folder: Path, name: str, form: ExportForm) -> Iterator[None]:
    """A model that does not become what is wanted leaves no half of it."""
    try:
        yield
    except Exception as error:  # whatever an exporter raises on a model that it has never seen
        shutil.rmtree(folder, ignore_errors=True)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        others = " or ".join(f"--format {other}" for other in get_args(ExportForm) if other != form)
        raise StartupError(f"variant '{name}' cannot be exported as {form}: {lines[0]} (try {others})") from error


def _write_onnx(model: Model, folder: Path, _: int) -> _Made:
    path = folder / "model.onnx"
    if model.format == OnnxModel.format:
        format_named(model.format).save(model, folder)
    else:
        from leanserve.passes.toolkit.lowering import as_onnx

        as_onnx(model, path)
    return _Made("onnx", path.name, ((path.name, "the model, an ONNX graph"),))


def _write_openvino(model: Model, folder: Path, threads: int) -> _Made:
    precision = getattr(model, "settings", {}).get("precision", "f32")
    with TemporaryDirectory(prefix="leanserve-export-") as scratch:
        if model.format != "openvino":
            from leanserve.passes.toolkit.lowering import as_onnx
            from leanserve.passes.toolkit.openvino_graph import convert

            model = convert(as_onnx(model, Path(scratch) / "model.onnx"), Path(scratch), threads)
        format_named("openvino").save(model, folder)
    files = (("model.xml", "the model, for OpenVINO"), ("model.bin", "its weights"))
    return _Made("openvino", "model.xml", files, precision)


def _write_torch(model: Model, folder: Path, _: int) -> _Made:
    if model.format != TorchModel.format:
        raise PassFailed(f"it is a graph for {model.format} already")
    import torch

    from leanserve.passes.toolkit.lowering import exported_program

    format_named(model.format).save(model, folder)
    torch.export.save(exported_program(cast("TorchModel", model)), folder / "model.pt2")
    weights = ("model.safetensors", "the weights alone, by the names of the module")
    return _Made("torch", "model.pt2", (("model.pt2", "the model, a program of torch.export"), weights))


WRITERS: Final[Mapping[ExportForm, Callable[[Model, Path, int], _Made]]] = {
    "onnx": _write_onnx,
    "torch": _write_torch,
    "openvino": _write_openvino,
}


def _config(work: AppContext, report: VariantReport, made: _Made, codec: Codec) -> dict[str, Json]:
    """What the script reads, and what a reader wants to know of the variant."""
    spec = report.spec
    inputs = [
        {"name": item.name, "dtype": item.dtype, "shape": item.shape} | ({"words": item.words} if item.words else {})
        for item in spec.inputs
    ]
    outputs = [
        {"name": item.name, "dtype": item.dtype, "shape": item.shape, "meaning": item.meaning} for item in spec.outputs
    ]
    return {
        "name": f"{work.base.name}-{report.name}",
        "format": made.form,
        "file": made.file,
        "inputs": inputs,
        "outputs": outputs,
        "labels": spec.labels,
        "labelled": spec.outputs[spec.labelled].name if spec.labels else None,
        "rows": spec.rows,
        "max_length": spec.max_length,
        "image": _image(codec),
        "text": {"tokenizer": "tokenizer.json", "max_length": codec.max_length}
        if isinstance(codec, TextCodec)
        else None,
        "passes": [{"kind": item.kind, **item.options} for item in report.ancestry[1:]],
        "caveats": work.base.caveats,
        "quality": report.quality.model_dump(mode="json"),
    }


def _image(codec: Codec) -> dict[str, Json] | None:
    """How an image becomes the input, as in the config's `base.image`."""
    if not isinstance(codec, ImageCodec):
        return None
    return {item.name: getattr(codec, item.name) for item in fields(codec) if item.name not in {"answers", "formats"}}


def _rendered(template: str, work: AppContext, report: VariantReport, made: _Made, files: list[tuple[str, str]]) -> str:
    spec: ModelSpec = report.spec
    shown = ", ".join(f"{item.name} {item.dtype} {[*item.shape]}".replace("None", "any") for item in spec.inputs)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string((TEMPLATES / f"{template}.j2").read_text(encoding="utf-8")).render(
        name=f"{work.base.name}-{report.name}",
        variant=report.name,
        base=work.base.name,
        version=__version__,
        format=made.form,
        precision=made.precision,
        library=LIBRARIES[made.form],
        inputs=shown,
        length=spec.size(16),
        rows=spec.most_rows(2),
        files=files,
        together=TOGETHER[spec.rows],
        passes=", ".join(str(item.kind) for item in report.ancestry[1:]),
        caveats=work.base.caveats,
    )
