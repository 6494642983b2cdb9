"""What the Open Inference Protocol tells about a model: its metadata, its configuration and its statistics.

Clients need them before they send anything: `tritonclient` to build inputs, `perf_analyzer` to generate load (it reads
the batch size from the configuration, drops the leading -1 of the metadata's shapes when that is above 0, and takes the
server's own queue and compute times from the statistics). Sources: the protocol's model metadata, Triton's
`model_config.proto` and its statistics extension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from leanserve.codecs.tensors import Port, ports
from leanserve.contracts import Json, ModelSpec


@dataclass(slots=True)
class Duration:
    """How often something took place, and the nanoseconds it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns

    def body(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


@dataclass(slots=True)
class Compute:
    """The three phases of an execution: rows into the batch, the model, the answers out of it."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)

    def body(self) -> dict[str, Json]:
        return {
            "compute_input": self.compute_input.body(),
            "compute_infer": self.compute_infer.body(),
            "compute_output": self.compute_output.body(),
        }


@dataclass(slots=True)
class Counters:
    """What one version of a model has done since it was loaded.

    `last_inference_ms` is milliseconds since the epoch, 0 before the first; `inference_count` counts rows,
    `execution_count` batches; the durations are per request, those of `batches` per execution, by rows in the batch.
    """

    last_inference_ms: int = 0
    inference_count: int = 0
    execution_count: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute: Compute = field(default_factory=Compute)
    batches: dict[int, Compute] = field(default_factory=dict)


def model_metadata(spec: ModelSpec, name: str, versions: Sequence[str], platform: str) -> dict[str, Json]:
    """`GET /v2/models/N`: the tensors with their whole shapes, the rows leading; -1 marks an axis that varies."""
    return {
        "name": name,
        "versions": list(versions),
        "platform": platform,
        "inputs": [_metadata(port) for port in ports(spec.inputs).values()],
        "outputs": [_metadata(port) for port in ports(spec.outputs).values()],
    }


def model_config(
    spec: ModelSpec, name: str, platform: str, max_rows: int, batch_rows: Sequence[int] = (), max_delay_us: int = 0
) -> dict[str, Json]:
    """`GET /v2/models/N/config`: as the metadata, but `dims` are those of one row.

    `max_rows` (at least 1) bounds a batch, `batch_rows` are the preferred sizes of one, and `max_delay_us` is how long
    the batcher may wait for more rows (microseconds).
    """
    return {
        "name": name,
        "platform": platform,
        "max_batch_size": max_rows,
        "input": [_config(port) for port in ports(spec.inputs).values()],
        "output": [_config(port) for port in ports(spec.outputs).values()],
        "dynamic_batching": {
            "preferred_batch_size": list(batch_rows),
            "max_queue_delay_microseconds": max_delay_us,
        },
    }


def in_sequences(config: Mapping[str, Json], spec: ModelSpec, most: int, idle_us: int) -> dict[str, Json]:
    """The configuration of a model with state: batches hold requests of several sequences, of each the oldest.

    A client may leave out the inputs that are state, which is what `optional` tells.
    """
    batching = config["dynamic_batching"]
    states = [port for port in ports(spec.inputs).values() if port.next_from is not None]
    names = {port.name for port in states}
    return {
        **{key: value for key, value in config.items() if key != "dynamic_batching"},
        "input": [item | {"optional": True} if item["name"] in names else item for item in config["input"]],
        "sequence_batching": {
            "max_sequence_idle_microseconds": idle_us,
            "oldest": {
                "max_candidate_sequences": most,
                "preferred_batch_size": batching["preferred_batch_size"],
                "max_queue_delay_microseconds": batching["max_queue_delay_microseconds"],
            },
            "state": [
                {
                    "input_name": port.name,
                    "output_name": port.next_from,
                    "data_type": _config(port)["data_type"],
                    "dims": list(port.shape[1:]),
                }
                for port in states
            ],
        },
    }


def statistics(models: Iterable[tuple[str, str, Counters]]) -> dict[str, Json]:
    """`GET /v2/models[/N[/versions/V]]/stats`, from name, version and counters of each."""
    return {"model_stats": [_statistics(name, version, counters) for name, version, counters in models]}


def _metadata(port: Port) -> dict[str, Json]:
    return {"name": port.name, "datatype": port.datatypes[0].name, "shape": list(port.shape)}


def _config(port: Port) -> dict[str, Json]:
    datatype = port.datatypes[0].name
    data_type = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
    return {"name": port.name, "data_type": data_type, "dims": list(port.shape[1:])}


def _statistics(name: str, version: str, counters: Counters) -> dict[str, Json]:
    phases: Mapping[str, Json] = {
        "success": counters.success.body(),
        "fail": counters.fail.body(),
        "queue": counters.queue.body(),
        **counters.compute.body(),
        # There is no response cache; clients that add the columns up want them nevertheless.
        "cache_hit": Duration().body(),
        "cache_miss": Duration().body(),
    }
    return {
        "name": name,
        "version": version,
        "last_inference": counters.last_inference_ms,
        "inference_count": counters.inference_count,
        "execution_count": counters.execution_count,
        "inference_stats": phases,
        "batch_stats": [{"batch_size": rows, **batch.body()} for rows, batch in sorted(counters.batches.items())],
    }
