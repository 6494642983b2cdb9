"""The messages of the files in `protocol/`, made from their compiled descriptors.

They live in a descriptor pool of their own, not in protobuf's global one: `tritonclient` and `kserve` register messages
of the same names there, and a process could otherwise not hold both a client and this server.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PROTOCOL = Path(__file__).parent / "proto"
SERVICE = "inference.GRPCInferenceService"


@cache
def message_pool() -> descriptor_pool.DescriptorPool:
    """The pool that holds all of them."""
    pool = descriptor_pool.DescriptorPool()
    for name in ("open_inference.binpb", "health.binpb"):
        for file in descriptor_pb2.FileDescriptorSet.FromString((PROTOCOL / name).read_bytes()).file:
            pool.Add(file)
    return pool


@cache
def message(name: str) -> Any:
    """The class of the message of that full name, or of `inference.<name>`."""
    full_name = name if "." in name else f"inference.{name}"
    return message_factory.GetMessageClass(message_pool().FindMessageTypeByName(full_name))
