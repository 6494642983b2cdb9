"""What is deployed fits together: the dashboard asks only for metrics that exist, compose and image agree."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prometheus_client.parser import text_string_to_metric_families

from fake_hardware import FakeNvml, busy_gpu, processor
from leanserve.config.schema import read_config
from leanserve.telemetry.hardware_metrics import Sources
from leanserve.telemetry.metrics import Metrics
from leanserve.telemetry.observations import VariantFacts, WorkerCounts

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/variants.json").read_text())
COMPOSE = yaml.safe_load(re.sub(r"\$\{\w+:-(.*?)\}", r"\1", (ROOT / "docker-compose.yml").read_text()))
"""With the defaults of its variables."""
DOCKERFILE = (ROOT / "Dockerfile").read_text()
RULES = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())
OWN_NAME = re.compile(r"\b(?:leanserve|nv)_[a-z_]+")
PROMTOOL = shutil.which("promtool", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool; `make prometheus` gets it on Debian")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Sample name -> label names of the page of one variant with traffic, on a machine that tells everything."""
    sources = Sources(powercap=processor(tmp_path_factory.mktemp("powercap")), nvml=FakeNvml(busy_gpu()))
    metrics = Metrics("digits", sources, threads=2)
    variant = metrics.add("int8", VariantFacts(("cast",), device="cpu", quality={"score": 1.0}, build_seconds=(1.0,)))
    variant.request_done("ok", 0.1)
    variant.batch_done(1, 0, 0.1, [0.1])
    variant.add_backend_facts({"escalated": 1})
    variant.workers = lambda: WorkerCounts({"SIGSEGV": 1}, are_there=True)
    told = metrics.experiment
    told.name, told.base, told.candidate, told.state = "one", "float", "int8", "running"
    told.questions = {"agreement": dict.fromkeys(("estimate", "low", "high", "limit"), 0.9)}
    told.shadows, told.moves, told.capped = {"busy": 1}, {"start": 1}, {"int8": 1}
    told.prices = lambda: {"int8": 1.0}
    page = metrics.render()[0].decode()
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_dashboard_asks_only_for_exported_metrics_and_labels(exported: dict[str, set[str]]) -> None:
    asked = {name for expression in expressions() for name in OWN_NAME.findall(expression)}
    assert len(asked) >= 10
    assert asked <= set(exported)
    for expression in expressions():
        for name, selector in re.findall(r"((?:leanserve|nv)_[a-z_]+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)[!=]?[=~]", selector)) <= exported[name], expression


def test_variables_of_the_dashboard_ask_only_for_exported_metrics(exported: dict[str, set[str]]) -> None:
    queries = [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"]]
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["model", "version"]
    for query in queries:
        name, label = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", query).groups()  # type: ignore[union-attr]
        assert label in exported[name]


def test_documentation_names_every_exported_metric_and_no_other(exported: dict[str, set[str]]) -> None:
    page = (ROOT / "docs/metrics.md").read_text()
    documented = set(OWN_NAME.findall(page))
    histograms = {name.removesuffix("_bucket") for name, labels in exported.items() if "le" in labels}
    parts = {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}
    own = {name for name in (exported.keys() - parts) | histograms if OWN_NAME.fullmatch(name)}
    assert own <= documented
    assert documented <= own | parts


def test_panels_use_the_provisioned_datasource_and_do_not_overlap() -> None:
    (source,) = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"]["uid"] == source["uid"]
        at = panel["gridPos"]
        covered = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not covered & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        cells |= covered


def _promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    assert PROMTOOL is not None
    return subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, check=False)


@needs_promtool
def test_every_expression_is_valid_promql(tmp_path: Path) -> None:
    parsed = [re.sub(r"\$__rate_interval", "1m", expression) for expression in expressions()]
    rules = [{"record": f"panel:{at}", "expr": expression} for at, expression in enumerate(parsed)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = _promtool("check", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_config_is_valid() -> None:
    file = ROOT / "deploy/prometheus/prometheus.yml"
    done = _promtool("check", "config", file)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_every_alert_fires_for_what_it_is_about_and_for_nothing_else() -> None:
    alerts = {rule["alert"] for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}
    cases = yaml.safe_load((ROOT / "tests/deploy/rules_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in cases for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert fired == alerts
    done = _promtool("test", "rules", ROOT / "tests/deploy/rules_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_ask_only_for_exported_metrics(exported: dict[str, set[str]]) -> None:
    rules = [rule for group in RULES["groups"] for rule in group["rules"]]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    for rule in rules:
        assert set(OWN_NAME.findall(rule["expr"])) <= set(exported), rule
        assert set(re.findall(r"leanserve:[\w:]+", rule["expr"])) <= recorded
        assert "alert" not in rule or rule["annotations"]["action"], "an alert says what to do"


def test_compose_with_keys_is_wired() -> None:
    """Every secret is a key of the config, and Prometheus has the one that may read."""
    folder = ROOT / "deploy/auth"
    added = yaml.safe_load((folder / "compose.yml").read_text())
    keys = {key.name: key for key in read_config(folder / "leanserve.yaml").auth.keys}
    assert {str(key.file) for key in keys.values()} == {f"/run/secrets/{name}" for name in added["secrets"]}
    for name, service in added["services"].items():
        assert name in COMPOSE["services"]
        assert set(service["secrets"]) <= set(added["secrets"])
        for volume in service["volumes"]:
            assert (ROOT / volume.partition(":")[0]).is_file()
    assert set(added["services"]["leanserve"]["secrets"]) == set(added["secrets"])
    mine, plain = (yaml.safe_load((at / "prometheus.yml").read_text()) for at in (folder, ROOT / "deploy/prometheus"))
    read_by = mine["scrape_configs"][0].pop("authorization")["credentials_file"]
    assert mine == plain
    assert Path(read_by).name in added["services"]["prometheus"]["secrets"]
    assert [(key.name, key.roles) for key in keys.values() if str(key.file) == read_by] == [("prometheus", ("read",))]


def test_compose_is_wired() -> None:
    services: dict[str, Any] = COMPOSE["services"]
    assert set(services) == {"leanserve", "leanserve-gpu", "prometheus", "grafana"}
    for name in ("prometheus", "grafana"):
        assert re.search(r":v?\d+\.\d+\.\d+$", services[name]["image"]), "image tags are pinned"
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
    scrape = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["static_configs"] == [{"targets": ["leanserve:8000"]}]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "deploy/grafana/dashboards" / Path(home).name).exists()


def test_a_profile_serves_on_gpus_in_the_place_of_the_cpu() -> None:
    on_cpu, on_gpu = COMPOSE["services"]["leanserve"], COMPOSE["services"]["leanserve-gpu"]
    assert on_gpu["profiles"] == ["gpu"]
    assert on_gpu["build"]["args"]["EXTRAS"] == "gpu"
    [device] = on_gpu["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", "all", ["gpu"])
    assert on_gpu["networks"]["default"]["aliases"] == ["leanserve"], "Prometheus asks there"
    own = {"profiles", "build", "image", "deploy", "networks"}
    assert {key: on_gpu[key] for key in on_gpu.keys() - own} == {key: on_cpu[key] for key in on_cpu.keys() - own}


def test_containers_can_do_no_more_than_they_must() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["mem_limit"], name
        assert service["pids_limit"] > 0, name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), f"{name} is open to the network"
    grafana = COMPOSE["services"]["grafana"]["environment"]
    assert grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true", "nobody may log in as admin/admin"
    assert grafana["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


def test_every_dependency_is_pinned_and_within_its_bounds() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(item for name in extras if name != "gpu" for item in extras[name])]
    for requirement in map(Requirement, wanted):
        if requirement.name != "torch":  # its builds differ, and it is bounded where it is installed
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    for user in ("Makefile", "Dockerfile"):
        assert "--constraint constraints.txt" in (ROOT / user).read_text()


def test_image_runs_as_a_user_with_a_cache_volume_and_a_health_check() -> None:
    assert "leanserve-cache:/var/cache/leanserve" in COMPOSE["services"]["leanserve"]["volumes"]
    for line in ("USER leanserve", "ENV LEANSERVE_CACHE=/var/cache/leanserve", "VOLUME /var/cache/leanserve"):
        assert line in DOCKERFILE.splitlines()
    health = re.search(r"HEALTHCHECK .*?CMD (\[.*?\])\n", DOCKERFILE, re.DOTALL)
    assert health
    _, script, address = json.loads(health[1])
    assert f"COPY deploy/ready.py {script}" in DOCKERFILE.splitlines()
    assert address == "127.0.0.1:8000"
    assert re.search(r'^ENTRYPOINT \["leanserve"\]$', DOCKERFILE, re.MULTILINE)
    command = re.search(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert command
    assert json.loads(command[1])[0] == "serve"


def test_build_context_holds_everything_the_image_copies() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [source for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.M) for source in line.split()[:-1]]
    copied = {source if source in allowed else Path(source).parts[0] for source in sources}
    assert copied == allowed
