"""Runs ONNX graphs with onnxruntime.

A session keeps its own threads. Between the operators of a batch they wait busily for each other: an encoder answers a
row in 5.1 instead of 6.3 ms. onnxruntime's own default goes on for 20 to 50 ms after the batch, which makes several
sessions in turn twice as slow. So they stop with the batch; only where the session is the only one of its process they
go on for a moment, so that a client who asks again at once finds them awake, which saves another 0.3 ms. In company
they also give up soon within a batch (docs/decisions/015-waiting-between-operators.md). A pool shared by all sessions
always spins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument

from leanserve.contracts import Arrays, Json, OnnxModel, Result
from leanserve.errors import BadInput, DeviceLost
from leanserve.memory import forget, is_out_of_memory
from leanserve.runtime.backends.engine_cache import EngineCache
from leanserve.runtime.backends.onnx_providers import provider_choice
from leanserve.runtime.cuda.faults import is_lost
from leanserve.runtime.formats.onnx_session import onnx_session
from leanserve.runtime.linux.denormals import flush_denormals
from leanserve.runtime.linux.spin_control import spin_us
from leanserve.runtime.onnx_arena import ERRORS_ONLY, share_arena

if TYPE_CHECKING:
    from leanserve.runtime.backends.onnx_binding import BoundSession

LEVELS = {
    "disable": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
AWAKE_S = 0.002
"""How long threads wait busily for the next batch, where no other session has any."""
BETWEEN_S = 0.0002
"""How long they wait busily for the next operator of a batch, where other sessions have threads, too."""
_BAD_INDEX = re.compile(r"while running \w+ node\..*Status Message: (.*\b(?:index|indices)\b.*)", re.DOTALL)
"""What a kernel says of a value that points beyond the tensor that is looked up."""
UNKNOWN_CATEGORY = "Unknown Category"
"""What the kernel of OneHotEncoder says of a word or a number that is none of its list."""


class OnnxRuntimeBackend:
    """A `contracts.Backend`. What the pass `onnxruntime` decided is in `model.session`; `{}` stands for its defaults.

    A lane of the device does its share of the work and has to flush denormals like the session's own threads, but
    onnxruntime sets only the one lane that opens the first session. So each is set by the first backend created on it,
    or at warm-up where lanes share one.

    Raises:
        StartupError: the execution provider asked for is not active on this machine.
    """

    def __init__(
        self,
        model: OnnxModel,
        threads: int,
        device: str = "cpu",
        *,
        alone: bool = False,
        processors: Sequence[int] = (),
    ) -> None:
        """`device` is where it computes unless the pass decided. `alone`: no other model is run in this process.
        `processors`: one for each of the threads, the first for that of the caller; empty: any.
        """
        settings = model.session
        choice = provider_choice(settings, device)
        self._device = choice.device
        choice.require(onnxruntime.get_available_providers())
        choice.load_libraries()
        engines = choice.engines_of(model)
        self._engines = None if engines is None else EngineCache(engines)
        self._session = onnx_session(
            str(model.path),
            _options(settings, threads, processors, alone=alone),
            choice.listed(model),
        )
        choice.require(self._session.get_providers())
        flush_denormals()
        self._inputs = [item.name for item in model.spec.inputs]
        self._outputs = [item.name for item in model.spec.outputs]
        self._bound = None if self._device == "cpu" else self._with_bound_inputs()

    def _with_bound_inputs(self) -> BoundSession:
        from leanserve.runtime.backends.onnx_binding import BoundSession

        return BoundSession(self._session, self._inputs, self._outputs, self._device)

    @property
    def name(self) -> str:
        return "onnxruntime"

    @property
    def device(self) -> str:
        return self._device

    @property
    def self_contained(self) -> bool:
        return True

    @property
    def row_buckets(self) -> tuple[int, ...]:
        return ()

    def run(self, batch: Arrays) -> Result:
        if self._bound is not None:
            return self._run_on_gpu(self._bound, batch)
        try:
            outputs: Any = self._session.run(self._outputs, dict(zip(self._inputs, batch, strict=True)))
        except InvalidArgument as error:
            told = _BAD_INDEX.search(str(error))
            if told is None:
                raise
            raise BadInput(f"the model looks up what an input's values point to: {told[1]}") from error
        except Fail as error:
            if UNKNOWN_CATEGORY not in str(error):
                raise
            raise BadInput("an input holds a category that the model was not made for") from error
        return Result(tuple(outputs))

    def _run_on_gpu(self, bound: BoundSession, batch: Arrays) -> Result:
        try:
            result = Result(bound.run(batch))
        except Exception as error:
            if is_lost(error):
                raise DeviceLost(f"{self._device} is lost to this process: {error}") from error
            if is_out_of_memory(error):
                forget(error)
                bound.clear()
            raise
        if self._engines is not None:
            self._engines.keep()
        return result

    def close(self) -> None:
        """Free the session with its threads and memory."""
        if self._bound is not None:
            self._bound.clear()
            self._bound = None
        del self._session


def _options(
    settings: Mapping[str, Json], threads: int, processors: Sequence[int], *, alone: bool
) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.graph_optimization_level = LEVELS[settings.get("optimisation", "all")]
    chosen = settings.get("threads", "auto")
    options.intra_op_num_threads = threads if chosen == "auto" else chosen
    options.inter_op_num_threads = 1
    if len(processors) == options.intra_op_num_threads > 1:
        counted_from_1 = ";".join(str(number + 1) for number in processors[1:])
        options.add_session_config_entry("session.intra_op_thread_affinities", counted_from_1)
    share_arena(options)
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    spinning = settings.get("spinning", "auto")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if spinning == "off" else "1")
    if not alone:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if alone or spinning == "auto":
        most = spin_us(AWAKE_S if alone else BETWEEN_S)
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(most))
    return options
