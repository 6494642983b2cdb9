"""wrk as a load generator: the same request again and again over a number of connections, in a closed loop.

It has to be installed (`apt install wrk`). It runs with one thread on the cores that the server uses as well; what it
takes of them is in `Load.client_cpu_s`.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

from loadtest.peers.process import HOST, PeerError
from loadtest.peers.roster import Request

_SCRIPT = """
local file = io.open({body}, "rb")
wrk.method, wrk.body = "POST", file:read("*a")
file:close()
{headers}
{unique}
function done(summary, latency, requests)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format('{{"requests": %d, "failed": %d, "us": %d, "p50_us": %d, "p99_us": %d}}\\n',
    summary.requests, failed, summary.duration, latency:percentile(50), latency:percentile(99)))
end
"""
_UNIQUE = """
local count = 0
function request()
  count = count + 1
  wrk.headers["x-request-id"] = string.format("%016x", count * 7919)
  return wrk.format()
end
"""
Heads = Literal["equal", "unique"]
"""Whether clients send the same bytes again and again, or another `x-request-id` with every request, as proxies do."""


class Load(NamedTuple):
    """What one run measured: answered requests per second, their latency, and CPU seconds of wrk itself."""

    rate: float
    failed: int
    p50_ms: float
    p99_ms: float
    requests: int
    client_cpu_s: float


def load(port: int, request: Request, connections: int, seconds: float, heads: Heads = "equal") -> Load:
    """Load a server on this machine. Raises `PeerError` where wrk is missing or cannot reach it."""
    wrk = shutil.which("wrk")
    if wrk is None:
        raise PeerError("wrk is not on the PATH; install it (apt install wrk)")
    with tempfile.TemporaryDirectory() as folder:
        body, script = Path(folder, "body"), Path(folder, "script.lua")
        body.write_bytes(request.body)
        headers = "\n".join(
            f"wrk.headers[{json.dumps(name)}] = {json.dumps(value)}" for name, value in request.headers.items()
        )
        unique = _UNIQUE if heads == "unique" else ""
        script.write_text(_SCRIPT.format(body=json.dumps(str(body)), headers=headers, unique=unique))
        url = f"http://{HOST}:{port}{request.path}"
        command = [wrk, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "60s"]
        before = _children_cpu_s()
        done = subprocess.run([*command, "-s", script, url], capture_output=True, text=True, check=False)
        used = _children_cpu_s() - before
    if done.returncode:
        raise PeerError(f"wrk failed on {url}:\n{done.stdout}{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Load(
        rate=(found["requests"] - found["failed"]) / found["us"] * 1e6,
        failed=found["failed"],
        p50_ms=found["p50_us"] / 1000,
        p99_ms=found["p99_us"] / 1000,
        requests=found["requests"],
        client_cpu_s=used,
    )


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
