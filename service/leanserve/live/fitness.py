"""Can a variant be compared with a base, and are both still the models that the comparison began with?"""

from __future__ import annotations

from leanserve.live.record import Arms
from leanserve.serving.fleet import Fleet


def why_unfit(fleet: Fleet, name: str, base: str) -> str:
    """Why a variant cannot be compared with a base now, in words that follow its name; empty if it can."""
    ours, theirs = fleet.variants.get(name), fleet.variants.get(base)
    if name == base:
        return "is the base"
    if ours is None:
        state, reason = fleet.status_of[name]
        return f"is {state}{f': {reason}' if reason else ''}"
    if theirs is None:
        return f"has a base that is {fleet.status_of[base].state}"
    if ours.spec != theirs.spec:
        return "takes or gives other tensors than the base"
    if any(field.next_from for field in ours.spec.inputs):
        return "keeps a state between requests, which answering again would change"
    return ""


def why_over(fleet: Fleet, arms: Arms) -> str:
    """Why the variants cannot be compared any more, whatever comes; empty if they can, or are away for a while."""
    for name, content in zip((arms.base, arms.candidate), arms.contents, strict=True):
        plan = fleet.plans.get(name)
        if plan is None or name not in fleet.opened:
            return f"the variant '{name}' is not there any more"
        if plan.content != content:
            return f"the variant '{name}' is another model now"
        if fleet.status_of[name].state == "failed":
            return f"the variant '{name}' has failed: {fleet.status_of[name].reason}"
    return ""
