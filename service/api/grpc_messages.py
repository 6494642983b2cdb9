"""The messages of `protocol/open_inference.proto`, made at import from its compiled descriptor.

They live in a descriptor pool of their own, not in protobuf's global one: `tritonclient` and `kserve` register messages
of the same names there, and a process could otherwise not hold both a client and this server.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

DESCRIPTOR = Path(__file__).parent / "protocol" / "open_inference.binpb"
SERVICE = "inference.GRPCInferenceService"


def _load(path: Path) -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file:
        pool.Add(file)
    return pool


POOL = _load(DESCRIPTOR)


def message(name: str) -> Any:
    """The class of the message `inference.<name>`."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(f"inference.{name}"))


ModelInferResponse = message("ModelInferResponse")
