"""The old place of `service.compression.tools.macs`, kept until its last importer has moved."""

from service.compression.tools.macs import count_macs, count_parameters

__all__ = ["count_macs", "count_parameters"]
