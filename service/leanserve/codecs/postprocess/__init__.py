"""Post-processing, from what a model computes to what a client wants: labels, boxes, text.

One file per kind of answer. A step is typed options and one `apply`; `chain.py` puts the steps of a config together.
The gate, the reports and experiments judge what a model computes itself: all this happens after it, for clients alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, get_args

from pydantic import Field

from leanserve.codecs.postprocess.boxes import Nms
from leanserve.codecs.postprocess.classes import Sigmoid, Softmax, Threshold, TopK
from leanserve.codecs.postprocess.ctc import Ctc
from leanserve.codecs.postprocess.step import PostStep

AnyStep = Annotated[Softmax | Sigmoid | TopK | Threshold | Nms | Ctc, Field(discriminator="kind")]

STEPS: Final[Mapping[str, type[PostStep]]] = {
    step.model_fields["kind"].default: step for step in get_args(get_args(AnyStep)[0])
}
"""By their names in the config."""
