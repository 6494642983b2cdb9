"""`GET /v1/models` and `GET /v1/models/{model}` as in OpenAI's API: which names may be sent as `model`.

A model is the base (the traffic split chooses), a variant, or both as `base:variant`. Only `/v1/embeddings` takes them,
so that of a base which gives no embeddings of texts the list is empty.
"""

from __future__ import annotations

import time

from leanserve.api.endpoint import Declaration, Endpoint, OpenAiErrorReply, endpoint, in_path
from leanserve.api.service import Service
from leanserve.codecs.openai import openai_error_body
from leanserve.codecs.tensors import clip
from leanserve.codecs.text import TextCodec
from leanserve.contracts import Base, Json
from leanserve.errors import NotFound, ServiceError
from leanserve.http.messages import Request, Response, Route, error_headers, json_response
from leanserve.serving.fleet import Fleet

MODELS = "/v1/models"


class ModelList:
    """The route of the list, and that of all paths below it."""

    def __init__(self, service: Service) -> None:
        self._fleet, self._base = service.fleet, service.base
        self._embeds = gives_embeddings(service.base)
        self._started = int(time.time())
        self.all = Route("GET", "read", self._all, refusal)
        self.one = Route("GET", "read", self._one, refusal)

    def endpoints(self) -> list[Endpoint]:
        """The list, and each model where there are any; other names below it are answered as unknown ones."""
        names = served_models(self._fleet) if self._embeds else []
        listed = Declaration("The models, as in OpenAI's API", refuses=OpenAiErrorReply)
        found = [endpoint(MODELS, self.all, listed)]
        if names:
            taken = {"model": in_path(names)}
            told = Declaration("One model, as in OpenAI's API", taken, refuses=OpenAiErrorReply)
            found.append(Endpoint(f"{MODELS}/{{model}}", {f"{MODELS}/{name}": self.one for name in names}, told))
        return found

    async def _all(self, _: Request) -> Response:
        names = served_models(self._fleet) if self._embeds else []
        return json_response({"object": "list", "data": [self._described(name) for name in names]})

    async def _one(self, caller: Request) -> Response:
        if not self._embeds:
            raise no_embeddings(self._base)
        model = caller.path.removeprefix(f"{MODELS}/")
        self._fleet.choose(variant_of(self._fleet, model), None)  # raises where it does not serve
        return json_response(self._described(model))

    def _described(self, model: str) -> Json:
        return {"id": model, "object": "model", "created": self._started, "owned_by": "leanserve"}


def gives_embeddings(base: Base) -> bool:
    """Whether the base takes texts, and answers each with an embedding and nothing else."""
    spec = base.spec
    meanings = [item.meaning for item in spec.outputs]
    return not spec.labels and meanings == ["embedding"] and isinstance(base.codec, TextCodec)


def served_models(fleet: Fleet) -> list[str]:
    """Every name that may be sent as `model` now, where embeddings are given."""
    if not fleet.variants:
        return []
    base = fleet.name
    return [base, *(name for variant in fleet.variants for name in (variant, f"{base}:{variant}"))]


def variant_of(fleet: Fleet, model: str) -> str | None:
    """The name of the variant that `model` names; `None` where it names the base.

    Raises:
        NotFound: no such model.
    """
    base = fleet.name
    if model == base:
        return None
    name = model.removeprefix(f"{base}:")
    if name not in fleet.plans:
        known = ", ".join((base, *(f"{base}:{variant}" for variant in fleet.plans)))
        raise NotFound(f"the model {clip(model)} does not exist; there are {known}")
    return name


def no_embeddings(base: Base) -> NotFound:
    """Why nothing may be sent as `model`."""
    return NotFound(f"the base '{base.name}' gives no embeddings of texts; POST /v1/predict answers what it does")


def refusal(error: ServiceError) -> Response:
    """The reply to a request that was refused or failed, in OpenAI's shape."""
    headers = [(name.encode(), value.encode()) for name, value in error_headers(error).items()]
    return json_response(openai_error_body(error), headers, error.status)
