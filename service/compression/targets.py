"""The old place of `service.compression.tools.targets`, kept until its last importer has moved."""

from service.compression.tools.targets import Targets

__all__ = ["Targets"]
