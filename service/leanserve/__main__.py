"""Command line and composition root: the only reader of arguments and environment, and the place where rooms meet."""

from __future__ import annotations

import faulthandler
import importlib.util
import logging
import os
import signal
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from leanserve import __version__
from leanserve.context import AppContext
from leanserve.disk import explained
from leanserve.errors import StartupError
from leanserve.privacy import send_nothing
from leanserve.request_identity import RequestInLog
from leanserve.timing import MEASURE_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leanserve.api.access import Key
    from leanserve.api.service import Service
    from leanserve.artifacts.manifest import VariantReport
    from leanserve.artifacts.store import ArtifactStore
    from leanserve.config.schema import ServiceConfig
    from leanserve.contracts import Base

INTERRUPTED = 128 + signal.SIGINT
"""Status of what was ended by Ctrl-C."""
SHIPPED = Path("models/digits.yaml")
USUAL = Path("leanserve.yaml")


def _usual_config() -> Path:
    """What `leanserve init` wrote in the working folder, else the shipped example."""
    return USUAL if USUAL.is_file() else SHIPPED


ConfigOption = Annotated[
    Path,
    typer.Option(
        "--config",
        "-c",
        default_factory=_usual_config,
        help="The YAML file.",
        show_default="leanserve.yaml here, else the shipped example",
        envvar="LEANSERVE_CONFIG",
    ),
]
CacheOption = Annotated[
    Path | None, typer.Option(help="Artifact store; overrides the file's `cache`.", envvar="LEANSERVE_CACHE")
]

MeasureOption = Annotated[
    float,
    typer.Option(
        "--measure-seconds",
        help="Bound on timing all variants: rounds beside other work are repeated until then.",
        min=0,
        envvar="LEANSERVE_MEASURE_SECONDS",
    ),
]

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
err = Console(stderr=True)
out = Console()


@app.command()
def serve(
    config: ConfigOption,
    cache: CacheOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    grpc_port: Annotated[int | None, typer.Option(help="Also serve gRPC, on this port.", min=1, max=65535)] = None,
    measure_s: MeasureOption = MEASURE_S,
) -> None:
    """Listen, build what is missing, gate, load and warm every variant, then answer requests."""
    from leanserve.api.server import Address, Interrupted, run_server
    from leanserve.api.tls import tls_files
    from leanserve.config.schema import read_config
    from leanserve.start import BuildFailed, ServiceStart

    started = time.monotonic()
    settings = read_config(config)
    tls = tls_files(settings.tls, config)
    start = ServiceStart(config, cache, settings, _warn, measure_s, os.environ)
    keys = start.keys_of(settings)
    _require_admin_key(settings, keys, host)
    claimed = _claim(host, port, "--port")
    if grpc_port is not None:
        if importlib.util.find_spec("grpc") is None:
            raise StartupError("--grpc-port needs the extra 'grpc': pip install 'leanserve[grpc]'")
        _claim(host, grpc_port, "--grpc-port").close()  # grpc binds by itself; this only finds out early
    address = Address(claimed, None if grpc_port is None else (host, grpc_port), tls)

    def announce(service: Service) -> None:
        fleet, base = service.fleet, service.base
        names = ", ".join(fleet.variants)
        lanes = f"{len(fleet.device.lanes)} x {fleet.device.lane_threads} threads"
        scheme = "http" if tls is None else "https"
        serves = f"{scheme}://{host}:{port} serves {base.name} as {names} on {lanes}{_caveats(base)}"
        err.print(f"ready in {time.monotonic() - started:.1f} s: {serves}", highlight=False, soft_wrap=True)

    try:
        run_server(settings, address, start, announce, keys)
    except BuildFailed as error:
        raise typer.Exit(error.status) from None
    except Interrupted as error:
        start.close()
        err.print(f"interrupted: {error}", highlight=False)
        sys.stderr.flush()
        os._exit(128 + error.number)  # what the start was at cannot be ended otherwise; nothing is left to save
    finally:
        start.close()


@app.command()
def build(
    config: ConfigOption,
    cache: CacheOption = None,
    measure_s: MeasureOption = MEASURE_S,
    tell: Annotated[int | None, typer.Option(hidden=True, help="File descriptor for `serve` to hear of it.")] = None,
) -> None:
    """Build, measure and gate every variant exactly as `serve` does, then stop."""
    work = AppContext(config, cache)
    if work.missing or work.disturbed:
        _build_here(work, measure_s, tell)
    else:
        err.print("everything is built already")
        if work.elsewhere:
            _warn(work.elsewhere)
    for report in work.reports():
        _tell_gate(report, _caveats(work.base))


@app.command()
def check(
    config: ConfigOption,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Also make every variant on a few rows.")] = False,  # noqa: FBT002
) -> None:
    """Validate the config (keys, values, pass order, names, whether this machine suits the passes); build nothing."""
    work = AppContext(config, None, make_cache=False)
    if rehearse:
        _rehearse(work)
    passes = sum(len(variant.passes) for variant in work.config.variants)
    out.print(f"{config}: {len(work.config.variants)} variants, {passes} passes, no problem found", highlight=False)


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="timm:NAME, transformers:NAME, FILE.onnx, FILE.pt2, module:factory ...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The config to write.")] = USUAL,
    data: Annotated[Path | None, typer.Option(help="Folder of images, .npz, .csv, .tsv or .jsonl.")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the texts in it.")] = None,
    pair: Annotated[str | None, typer.Option(help="Column of the second texts.")] = None,
    label: Annotated[str | None, typer.Option(help="Column, or array, of the labels.")] = None,
    inputs: Annotated[
        list[str] | None, typer.Option(help="Array of an input: INPUT=ARRAY; of a table INPUT=COLUMN,COLUMN.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="A checkpoint, or: hub, random.")] = None,
    weights_key: Annotated[str | None, typer.Option(help="Of several weights in it, such as state_dict_ema.")] = None,
    task: Annotated[str | None, typer.Option(help="Of transformers: classification or embedding.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Text file with one class name per line.")] = None,
    image: Annotated[str | None, typer.Option(help="Takes images of WIDTHxHEIGHT (grey: WIDTHxHEIGHTxL).")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Takes texts, by this tokenizer.json.")] = None,
    shape: Annotated[list[str] | None, typer.Option("--input", help="Takes NAME=3,224 or NAME:int64=?.")] = None,
    argument: Annotated[list[str] | None, typer.Option(help="Of the factory: NAME=VALUE.")] = None,
    meaning: Annotated[list[str] | None, typer.Option(help="Gives NAME=logits, NAME=probabilities ...")] = None,
) -> None:
    """Look at a model and write a commented config with variants worth trying on this machine."""
    from leanserve.init.data_argument import ToldColumns, data_seen
    from leanserve.init.model_argument import Hints
    from leanserve.init.writing import is_unfinished, write_config

    if output.exists() and not is_unfinished(output):
        raise StartupError(f"{output} exists and is not replaced; remove it, or write another file with --output")
    lists = (tuple(given or ()) for given in (shape, argument, meaning))
    hints = Hints(weights, weights_key, task, labels, image, tokenizer, *lists)
    with err.status(f"looking at {escape(model)} ..."):
        columns = ToldColumns(text, pair, label, tuple(inputs or ()))
        profile, suggestions, left, remarks = write_config(model, output, hints, data, columns)
    err.print(f"{profile.name}: {escape(profile.inputs)} -> {escape(profile.outputs)}", highlight=False, soft_wrap=True)
    if (seen := data_seen(data)) is not None:
        err.print(f"data: {escape(seen)}", highlight=False, soft_wrap=True)
    for suggestion in suggestions:
        err.print(f"  {suggestion.name}: {escape(suggestion.expect)}", highlight=False, soft_wrap=True)
    for variant in left:
        err.print(f"  not {variant.name}: {escape(variant.reason)}", highlight=False, soft_wrap=True)
    for remark in (*profile.caveats, *remarks):
        err.print(f"[yellow]check:[/] {escape(remark)}", highlight=False, soft_wrap=True)
    err.print(f"wrote {output}; next: leanserve serve --config {output}", highlight=False, soft_wrap=True)


@app.command()
def schema() -> None:
    """Print the JSON schema of the config file, for editors."""
    import json

    from leanserve.config.schema import ServiceConfig

    typer.echo(json.dumps(ServiceConfig.model_json_schema(), indent=2))


@app.command()
def report(
    config: ConfigOption,
    cache: CacheOption = None,
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained page.")] = None,
) -> None:
    """Show quality and cost of every built variant."""
    from leanserve.report.summary import HourlyPrice
    from leanserve.report.table import print_table, write_html

    work = AppContext(config, cache)
    _require_built(work, config)
    reports, hardware = work.reports(), work.config.hardware
    price = None if hardware.price_per_hour is None else HourlyPrice(hardware.price_per_hour, hardware.currency)
    print_table(reports, out, work.base.caveats, work.elsewhere, price)
    if html is not None:
        title = f"leanserve: variants of {work.base.name}"
        write_html(reports, html, title, work.base.caveats, work.elsewhere, price)
        err.print(f"wrote {html}", highlight=False)


@app.command()
def bench(
    config: ConfigOption,
    cache: CacheOption = None,
    seconds: Annotated[float, typer.Option(help="Measuring time per variant and batch size.", min=0.1)] = 2.0,
    rows: Annotated[list[int] | None, typer.Option(help="Batch sizes (repeat the option).", min=1, max=65536)] = None,
) -> None:
    """Measure all variants side by side, interleaved on one device, and print ratios to the first."""
    from leanserve.bench import print_bench, run_bench

    work = AppContext(config, cache)
    _require_built(work, config)
    warm = work.open_variants()
    try:
        print_bench(run_bench(warm, tuple(rows or (1, 8, 32)), seconds), out, work.base.caveats)
    finally:
        warm.close()


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Of whoever is to have it.")],
    role: Annotated[list[str] | None, typer.Option(help="predict, read or admin (repeat the option).")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A new file for the key.")] = None,
) -> None:
    """Make a key, and print the line for the config that admits it: its sha256, not the key."""
    from leanserve.api.keys import line_of_config, new_key, write_key

    made = new_key()
    line = line_of_config(made, name, role or ["predict", "read"])
    if output is None:
        err.print("the key, which is shown this once:", highlight=False)
        typer.echo(made, err=True)
    else:
        write_key(made, output)
        err.print(f"the key is in {escape(str(output))}", highlight=False, soft_wrap=True)
    err.print("the line below auth.keys of the config:", highlight=False)
    typer.echo(line)


@app.command()
def export(
    variant: Annotated[str, typer.Argument(help="Name of the variant.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.")],
    config: ConfigOption,
    cache: CacheOption = None,
    form: Annotated[
        Literal["onnx", "torch", "openvino"] | None,
        typer.Option("--format", help="By default OpenVINO's where it is served from that, else ONNX."),
    ] = None,
) -> None:
    """Write a built variant into a folder, with a script that runs it without leanserve."""
    from leanserve.export.writing import export_variant

    work = AppContext(config, cache)
    _require_built(work, config)
    files = export_variant(work, variant, output, form)
    err.print(f"wrote {output}: {', '.join(files)}", highlight=False, soft_wrap=True)


@app.command()
def cache(
    action: Annotated[Literal["list", "verify", "prune"], typer.Argument(help="What to do.")],
    config: Annotated[list[Path] | None, typer.Option("--config", "-c", help="Keep what it needs (repeat it).")] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--cache", help="The store; by default that of the first config.", envvar="LEANSERVE_CACHE"),
    ] = None,
    older_than: Annotated[float | None, typer.Option(help="Prune only what was made so many days ago.", min=0)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be removed.")] = False,  # noqa: FBT002
) -> None:
    """Look after an artifact store: list it, verify it (status 1 if something is damaged), prune what is not needed."""
    from leanserve import upkeep

    store = _store(config or [], folder)
    if action == "list":
        for item in upkeep.stored_artifacts(store):
            text = f"{item.key}  {item.bytes / 2**20:8.1f} MiB  {item.days:6.1f} days  {item.words}"
            out.print(escape(text), highlight=False, soft_wrap=True)
    elif action == "verify":
        found = upkeep.faults(store)
        for fault in found:
            out.print(escape(fault), highlight=False, soft_wrap=True)
        out.print(f"{store.root}: {len(found)} damaged", highlight=False, soft_wrap=True)
        raise typer.Exit(int(bool(found)))
    else:
        _prune(store, config or [], older_than, dry_run=dry_run)


@app.command()
def experiment(
    action: Annotated[Literal["show", "start", "promote", "abort", "watch"], typer.Argument(help="What to do.")],
    candidate: Annotated[str | None, typer.Argument(help="Of `start`: the variant to be tried.")] = None,
    url: Annotated[
        str, typer.Option(help="Where the service listens.", envvar="LEANSERVE_URL")
    ] = "http://127.0.0.1:8000",
    key: Annotated[str | None, typer.Option(help="A key of the service.", envvar="LEANSERVE_KEY")] = None,
    reason: Annotated[str, typer.Option(help="Of `promote` and `abort`: why, for the record.")] = "",
    name: Annotated[str | None, typer.Option(help="Of the experiment.")] = None,
    base: Annotated[str | None, typer.Option(help="Compare with this variant; by default who has the traffic.")] = None,
    shadow_share: Annotated[float | None, typer.Option(help="Share of batches to answer again.", min=0, max=1)] = None,
    stages: Annotated[str | None, typer.Option(help="Shares of the ramp: 0.01,0.1,1.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Of `promote`: also into the config file.")] = False,  # noqa: FBT002
    every: Annotated[float, typer.Option(help="Of `watch`: seconds between two looks.", min=0.2)] = 1.0,
) -> None:
    """Compare a variant with the base on the live traffic of a service that runs: start it, watch it, end it."""
    from leanserve.experiment_client import RunningService, overview, watch

    service = RunningService(url, key)
    if action == "watch":
        watch(service, out, every)
        return
    if action == "show":
        document = service.document()
    elif action == "start":
        if candidate is None:
            raise StartupError("say which variant is to be tried: leanserve experiment start NAME")
        wish = {"candidate": candidate, "name": name, "base": base, "shadow_share": shadow_share}
        body = {key: value for key, value in wish.items() if value is not None}
        document = service.act("start", body | ({} if stages is None else {"stages": _shares(stages)}))
    else:
        document = service.act(action, {"reason": reason} | ({"write": True} if write else {}))
    out.print(overview(document))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise StartupError(f"--stages {text}: shares with commas between, such as 0.01,0.1,1") from None


def _rehearse(work: AppContext) -> None:
    from leanserve.init.rehearsal import refused_variants

    with err.status("making every variant on a few rows ..."):
        left = refused_variants(work.base, work.config)
    if left:
        raise StartupError("\n".join(f"variant '{item.name}' cannot be made: {item.reason}" for item in left))


def _tell_gate(report: VariantReport, caveats: str) -> None:
    """What the gate says of a variant, and which of its passes bring no speed."""
    state = f"excluded: {report.reason}" if report.reason else "passes its gate"
    if report.quality.memory_rows is not None:
        state += f"; there is memory for batches of at most {report.quality.memory_rows} rows"
    err.print(f"{report.name}: {escape(state + caveats)}", highlight=False, soft_wrap=True)
    if report.doubt is not None:
        _warn(f"{report.name}: {report.doubt}")
    for position, manifest in enumerate(report.ancestry[1:], start=1):
        if manifest.change in {"no gain", "slower"}:
            err.print(f"  pass {position} ({manifest.kind}): {manifest.change}", highlight=False, soft_wrap=True)


def _store(configs: list[Path], folder: Path | None) -> ArtifactStore:
    """The store that is meant; it must be there."""
    from leanserve.artifacts.store import ArtifactStore
    from leanserve.config.schema import read_config

    if folder is None and not configs:
        raise StartupError("say which cache: --cache FOLDER, or --config FILE for that of a config")
    root = folder or read_config(configs[0]).cache
    if not (root / "artifacts").is_dir():
        raise StartupError(f"{root} is no cache folder of leanserve")
    return ArtifactStore(root)


def _prune(store: ArtifactStore, configs: list[Path], older_than: float | None, *, dry_run: bool) -> None:
    from leanserve import upkeep

    if not configs and older_than is None:
        raise StartupError("say what to keep: --config FILE for each config in use, or --older-than DAYS")
    if not store.writable:
        raise StartupError(f"{store.root} is read-only")
    kept = {key for config in configs for key in AppContext(config, store.root).plan.keys}
    pruned = upkeep.prune(store, kept, (older_than or 0.0) * upkeep.DAY_S, dry_run=dry_run)
    for item in pruned.artifacts:
        out.print(escape(f"{item.key}  {item.words}"), highlight=False, soft_wrap=True)
    told = f"{len(pruned.artifacts)} artifacts, {pruned.bytes / 2**20:.1f} MiB"
    err.print(f"{'would remove' if dry_run else 'removed'} {told}", highlight=False, soft_wrap=True)


def _require_built(work: AppContext, config: Path) -> None:
    if work.missing:
        raise StartupError(f"{config}: {work.missing}; run `leanserve build --config {config}` first")


def _warn(text: str) -> None:
    err.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)


def _caveats(base: Base) -> str:
    return f" ({', '.join(base.caveats)})" if base.caveats else ""


def _require_admin_key(settings: ServiceConfig, keys: Sequence[Key], host: str) -> None:
    from leanserve.api.access import is_loopback

    if settings.model_control == "explicit" and not keys and not is_loopback(host):
        raise StartupError(
            "model_control: explicit lets clients unload models, and other machines reach this address: name a key of "
            "the role admin under auth.keys (`leanserve key ops --role admin` makes one), or listen on 127.0.0.1"
        )


def _claim(host: str, port: int, option: str) -> socket.socket:
    from leanserve.http.listening import listen

    try:
        return listen(host, port)
    except OSError as error:
        text = f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or {option}"
        raise StartupError(text) from error


def _build_here(work: AppContext, measure_s: float, tell: int | None) -> None:
    from leanserve.build.progress import BuildProgress, tell_by

    with BuildProgress(err, len(work.plan.keys) + 1, tell_by(tell)).running() as progress:
        work.build(progress, measure_s)


def _log_to_stderr() -> None:
    """Every line that is about a request names it, as its reply does."""
    handler = logging.StreamHandler()
    handler.addFilter(RequestInLog())
    form = "%(asctime)s %(levelname)s %(name)s%(request)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, handlers=[handler])


def main() -> None:
    """Run the command line; what is wrong with files, memory or settings is one line, without a stack, and status 2."""
    faulthandler.enable()
    send_nothing()
    _log_to_stderr()
    logging.getLogger("leanserve").setLevel(logging.INFO)
    # Pillow tells of everything odd in a file; files come with requests, and the log is not theirs to fill.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    # A supervisor's SIGTERM during building or loading must end the process like Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app()
    except StartupError as error:
        _end(str(error))
    except OSError as error:  # what a file, a disk or a permission did where nobody expected it
        logging.getLogger(__name__).debug("ended by", exc_info=True)
        _end(explained(error))
    except MemoryError as error:
        _end(f"memory ran out ({error}); give it more, or ask for less: fewer or smaller rows, variants, lanes")
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            err.print("interrupted", highlight=False)
        raise
    finally:
        # The process ends. A signal that comes now would raise inside a finalizer of some library.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def _end(text: str) -> NoReturn:
    err.print(f"[bold red]error:[/] {escape(text)}", highlight=False, soft_wrap=True)
    sys.stderr.flush()
    os._exit(2)  # device threads may be stuck in a model; nothing is left to save


if __name__ == "__main__":
    main()
