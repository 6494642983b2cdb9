"""What the endpoints are made of, handed to each of them: so that none has to reach through one part for another."""

from __future__ import annotations

from typing import NamedTuple

from leanserve.api.access import Access
from leanserve.codecs.postprocess.chain import PostChain
from leanserve.config.schema import ServiceConfig
from leanserve.contracts import Base
from leanserve.live.director import Director
from leanserve.live.snapshot import LiveNumbers
from leanserve.serving.fleet import Fleet


class Service(NamedTuple):
    """The variants that answer, the base that they were made of, what the config says about clients, who may do what,
    what becomes of outputs before clients see them, and how experiments and all else go."""

    fleet: Fleet
    base: Base
    config: ServiceConfig
    access: Access
    post: PostChain
    experiments: Director
    live: LiveNumbers
