"""One arena for what all onnxruntime sessions of a process compute with, which can be told to give memory back.

By itself every session has an arena of its own, which keeps what its largest batch ever took: an encoder of 90 MB held
1.1 GB after one batch of 16 rows of 512 tokens, in every session that met one at warm-up. From one arena for all of
them, the largest batches of those that run at the same time are served. Weights stay outside of it, so that they go
with their session.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime

from leanserve.runtime.formats.onnx_session import onnx_session
from leanserve.runtime.linux.spin_control import RELU

ERRORS_ONLY = 3
"""onnxruntime's level of what it logs."""


def share_arena(options: onnxruntime.SessionOptions) -> None:
    """Have the session that is opened with these options compute in the arena of the process."""
    _smallest_session()
    _use_it(options)


def shrink_arena() -> None:
    """Give back to the system what no session computes with now; the next batches take it anew. Tens of milliseconds
    at most."""
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    _smallest_session().run(None, {"x": np.zeros(1, np.float32)}, options)


@cache
def _smallest_session() -> onnxruntime.InferenceSession:
    """Makes the arena at its first call; onnxruntime shrinks one only at the end of a run."""
    kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    memory = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg({}))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    _use_it(options)
    return onnx_session(RELU, options)


def _use_it(options: onnxruntime.SessionOptions) -> None:
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
