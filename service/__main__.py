"""Command line and composition root: the only reader of arguments and environment, and the place where rooms meet."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from service import __version__
from service.errors import ConfigError, StartupError

if TYPE_CHECKING:
    from service.compression.artifacts import ArtifactStore
    from service.compression.build import Plan
    from service.compression.manifest import VariantReport
    from service.config import ServiceConfig
    from service.contracts import Base
    from service.serving.fleet import Fleet

SHIPPED = Path("models/digits.yaml")
ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The YAML file.", envvar="LEANSERVE_CONFIG")]
CacheOption = Annotated[
    Path | None, typer.Option(help="Artifact store; overrides the file's `cache`.", envvar="LEANSERVE_CACHE")
]

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
err = Console(stderr=True)
out = Console()


@app.command()
def serve(
    config: ConfigOption = SHIPPED,
    cache: CacheOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    grpc_port: Annotated[int | None, typer.Option(help="Also serve gRPC, on this port.", min=1, max=65535)] = None,
) -> None:
    """Build what is missing, gate, load and warm every variant, then answer requests."""
    from service.api.server import serve_fleet

    started = time.monotonic()
    work = _Workplace(config, cache)
    claimed = _claim(host, port, "--port")
    if grpc_port is not None:
        if importlib.util.find_spec("grpc") is None:
            raise StartupError("--grpc-port needs the extra 'grpc': pip install 'leanserve[grpc]'")
        _claim(host, grpc_port, "--grpc-port").close()  # grpc binds by itself; this only finds out early
    if not work.finished:
        _build_in_child(config, work.store.root)
    fleet = _open_fleet(work)
    ready = time.monotonic() - started
    names = ", ".join(fleet.variants)
    lanes = f"{len(fleet.device.lanes)} x {fleet.device.lane_threads} threads"
    text = f"ready in {ready:.1f} s: http://{host}:{port} serves {fleet.base.name} as {names} on {lanes}"
    err.print(text, highlight=False, soft_wrap=True)
    serve_fleet(fleet, claimed, None if grpc_port is None else (host, grpc_port))


@app.command()
def build(config: ConfigOption = SHIPPED, cache: CacheOption = None) -> None:
    """Build, measure and gate every variant exactly as `serve` does, then stop."""
    work = _Workplace(config, cache)
    if work.finished:
        err.print("everything is built already")
    else:
        _build_here(work)
    for report in work.reports():
        state = f"excluded: {report.reason}" if report.reason else "passes its gate"
        err.print(f"{report.name}: {escape(state)}", highlight=False, soft_wrap=True)


@app.command()
def check(config: ConfigOption = SHIPPED) -> None:
    """Validate the config (keys, values, pass order, names, whether this machine suits the passes); build nothing."""
    work = _Workplace(config, None, make_cache=False)
    passes = sum(len(variant.passes) for variant in work.config.variants)
    out.print(f"{config}: {len(work.config.variants)} variants, {passes} passes, no problem found", highlight=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of the config file, for editors."""
    import json

    from service.config import ServiceConfig

    typer.echo(json.dumps(ServiceConfig.model_json_schema(), indent=2))


@app.command()
def report(
    config: ConfigOption = SHIPPED,
    cache: CacheOption = None,
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained page.")] = None,
) -> None:
    """Show quality and cost of every built variant."""
    from service.compression.report import print_table, write_html

    work = _Workplace(config, cache)
    if not work.finished:
        raise StartupError(f"not every variant of {config} is built; run `leanserve build --config {config}` first")
    reports = work.reports()
    print_table(reports, out)
    if html is not None:
        write_html(reports, html, title=f"leanserve: variants of {work.base.name}")
        err.print(f"wrote {html}", highlight=False)


@app.command()
def bench(
    config: ConfigOption = SHIPPED,
    cache: CacheOption = None,
    seconds: Annotated[float, typer.Option(help="Measuring time per variant and batch size.", min=0.1)] = 2.0,
    rows: Annotated[list[int] | None, typer.Option(help="Batch sizes (repeat the option).")] = None,
) -> None:
    """Measure all variants side by side, interleaved on one device, and print ratios to the first."""
    from service.bench import print_bench, run_bench

    work = _Workplace(config, cache)
    if not work.finished:
        raise StartupError(f"not every variant of {config} is built; run `leanserve build --config {config}` first")
    fleet = _open_fleet(work)
    try:
        print_bench(run_bench(fleet, tuple(rows or (1, 8, 32)), seconds), out)
    finally:
        fleet.close()


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


class _Workplace:
    """A read config with its base, plan and store: what every command starts from."""

    def __init__(self, path: Path, cache: Path | None, *, make_cache: bool = True) -> None:
        from service.bases.opening import Origin, open_base
        from service.compression.build import finished, plan
        from service.config import read_config
        from service.machine import thread_budget

        self.config: ServiceConfig = read_config(path)
        root = cache or self.config.cache
        origin = Origin(
            base=self.config.base,
            data=self.config.data,
            folder=path.resolve().parent,
            cache=root.resolve() if make_cache else None,
        )
        self.base: Base = open_base(origin)
        self.plan: Plan = plan(self.config, self.base)
        self.threads: int = thread_budget() if self.config.threads == "auto" else self.config.threads
        if self.config.lanes != "auto" and self.config.lanes > self.threads:
            raise ConfigError(
                f"{path}: lanes is {self.config.lanes}, but there are only {self.threads} threads to share"
            )
        self.store: ArtifactStore
        if make_cache:
            from service.compression.artifacts import ArtifactStore

            self.store = ArtifactStore(root)
            self.finished = finished(self.store, self.plan, self.threads)

    def reports(self) -> list[VariantReport]:
        """Every variant's report; raises where a gate says abort, or where none is left to serve."""
        from service.compression.build import reports
        from service.errors import GateFailed

        found = reports(self.store, self.config, self.plan, self.threads)
        if all(report.state == "excluded" for report in found):
            raise GateFailed("; ".join(f"variant '{item.name}' is excluded: {item.reason}" for item in found))
        return found

    def lanes(self, reports: list[VariantReport]) -> int:
        """Batches that run at a time: as configured, or as pays for the variants that serve."""
        from service.compression.build import speeds

        if self.config.lanes != "auto":
            return self.config.lanes
        race = speeds(self.store, self.plan, self.threads)
        assert race is not None  # what is reported was measured
        return race.best_lanes([report.chain[-1].key for report in reports if report.state == "serving"])


def _claim(host: str, port: int, option: str) -> socket.socket:
    from service.api.server import listen

    try:
        return listen(host, port)
    except OSError as error:
        text = f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or {option}"
        raise StartupError(text) from error


def _build_here(work: _Workplace) -> None:
    from service.compression.build import Builder
    from service.compression.progress import BuildProgress

    with BuildProgress(err, len(work.plan.keys) + 1).running() as progress:
        Builder(work.store, work.config, work.base, work.threads, progress).build(work.plan)


def _build_in_child(config: Path, cache: Path) -> None:
    """Build in a process of its own, so that compression can neither stall the server nor leak into it."""
    command = [sys.executable, "-m", "service", "build", "--config", str(config), "--cache", str(cache)]
    child = subprocess.Popen(command)
    try:
        status = child.wait()
    except BaseException:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise
    if status != 0:
        raise typer.Exit(status if status > 0 else 1)  # the child has said why


def _open_fleet(work: _Workplace) -> Fleet:
    """Load and warm every variant that passed its gate, on every lane of the device."""
    from functools import partial

    from service.backends.choose import open_backend
    from service.compression.load import load_model
    from service.serving.device import Device
    from service.serving.fleet import Fleet

    reports = work.reports()
    device = Device("cpu", work.threads, work.lanes(reports))
    fleet = Fleet(work.base, work.config, reports, device)

    def load(key: str) -> Any:
        return open_backend(load_model(work.store, work.base, key), device.lane_threads)

    for variant, steps in work.plan.chains:
        if fleet.reports[variant.name].state == "serving":
            fleet.open(variant.name, partial(load, steps[-1].key), work.config.batch_of(variant))
    return fleet


def main() -> None:
    """Run the command line; a `StartupError` is printed without a stack and ends with status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("service").setLevel(logging.INFO)
    # A supervisor's SIGTERM during building or loading must end the process like Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app()
    except StartupError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.stderr.flush()
        os._exit(2)  # device threads may be stuck in a model; nothing is left to save


if __name__ == "__main__":
    main()
