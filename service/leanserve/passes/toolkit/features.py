"""What layers of a student and of its teacher have in common, as losses: hints, attention maps, relations of rows.

`hints` compares features themselves, through a projection where widths differ (Romero et al., "FitNets", 2015);
`attention` where in an image or text the features are strong (Zagoruyko and Komodakis, "Paying More Attention to
Attention", 2017); `relations` how far the rows of a batch are from each other, and at which angles (Park et al.,
"Relational Knowledge Distillation", 2019). Exits are classifiers on inner features, for a network that teaches its own
beginnings (Zhang et al., "Be Your Own Teacher", 2019). Projections and exits are parameters of the objective and gone
with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanserve.contracts import TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.toolkit.teacher import MatchTeacher, floats_of
from leanserve.passes.toolkit.training_run import Objective
from leanserve.runtime.formats.torch_size import example

FeatureLoss: TypeAlias = Literal["hints", "attention", "relations"]


def stack_layers(module: nn.Module) -> list[str]:
    """The layers that are compared if none are named: children of lists and sequences that have children themselves."""
    stacks = [
        (name, child) for name, child in module.named_modules() if isinstance(child, nn.Sequential | nn.ModuleList)
    ]
    inside = [
        f"{name}.{key}".lstrip(".")
        for name, child in stacks
        for key, item in child.named_children()
        if list(item.children())
    ]
    return [name for name in inside if not any(name.startswith(other + ".") for other in inside)]


class Watch:
    """The outputs of named layers of the last run of a module; nothing is left of it after `watching`."""

    def __init__(self, module: nn.Module, layers: Sequence[str]) -> None:
        self._module = module
        self._layers = layers
        self.seen: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep outputs while the block runs."""
        with ExitStack() as stack:
            for name in self._layers:
                layer = self._module.get_submodule(name)
                stack.callback(layer.register_forward_hook(self._keeper(name)).remove)
            yield
        self.seen = {}

    def _keeper(self, name: str) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self.seen[name] = output[0] if isinstance(output, tuple) else output

        return keep


def features_of(module: nn.Module, layers: Sequence[str], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What layers give for these inputs."""
    watch = Watch(module, layers)
    with watch.watching(), torch.no_grad():
        module(*inputs)
        return dict(watch.seen)


class MatchFeatures(Objective):
    """A teacher's answers, and beside them what it has inside: `layers` names those of the student and of the teacher
    that belong together."""

    def __init__(
        self, answers: MatchTeacher, model: TorchModel, layers: Mapping[str, str], loss: FeatureLoss, weight: float
    ) -> None:
        self._answers, self._layers, self._loss, self._weight = answers, layers, loss, weight
        self.ours = Watch(answers.student, list(layers))
        self.theirs = Watch(answers.teacher, list(dict.fromkeys(layers.values())))
        self._projections = nn.ModuleDict(self._projected(model)) if loss == "hints" else nn.ModuleDict()

    def extra(self) -> nn.Module:
        return self._projections

    def teachers(self) -> Sequence[nn.Module]:
        return self._answers.teachers()

    def to(self, device: str) -> None:
        self._answers.to(device)

    def loss(self, inputs: tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
        distance = self._answers.loss(inputs, labels)
        parts = [self._distance(ours, theirs) for ours, theirs in self._layers.items()]
        return distance + self._weight * torch.stack(parts).mean()

    def _distance(self, ours: str, theirs: str) -> Tensor:
        given, wanted = self.ours.seen[ours].float(), self.theirs.seen[theirs].float()
        if self._loss != "hints":
            return BY_LAYER[self._loss](given, wanted)
        key = ours.replace(".", "/")
        return hints(self._projections[key](_last(given)) if key in self._projections else _last(given), _last(wanted))

    def _projected(self, model: TorchModel) -> dict[str, nn.Module]:
        """Linear maps from the student's channels to the teacher's, where they are not as many."""
        inputs = example(model.spec, rows=2)
        given = features_of(self._answers.student, list(self._layers), inputs)
        wanted = features_of(self._answers.teacher, list(self._layers.values()), inputs)
        found: dict[str, nn.Module] = {}
        for ours, theirs in self._layers.items():
            mine, yours = _last(given[ours]), _last(wanted[theirs])
            if mine.shape[:-1] != yours.shape[:-1]:
                shapes = f"'{ours}' gives {list(given[ours].shape[1:])} and '{theirs}' {list(wanted[theirs].shape[1:])}"
                raise PassFailed(
                    f"layers: {shapes}; hints compare position by position: take relations, or layers of one resolution"
                )
            if mine.shape[-1] != yours.shape[-1]:
                found[ours.replace(".", "/")] = nn.Linear(mine.shape[-1], yours.shape[-1])
        return found


class TeachExits(Objective):
    """Classifiers on inner layers that learn from the last answers, so that the layers before them learn too."""

    def __init__(self, answers: MatchTeacher, model: TorchModel, layers: Sequence[str], weight: float) -> None:
        self._answers, self._weight = answers, weight
        self.watch = Watch(answers.student, layers)
        inputs = example(model.spec, rows=2)
        seen = features_of(answers.student, layers, inputs)
        with torch.no_grad():
            outputs = floats_of(answers.student(*inputs))
        if any(output.ndim != 2 for output in outputs):
            raise PassFailed("mode: self puts exits on inner layers, which needs answers of one vector per row")
        self._sizes = [output.shape[-1] for output in outputs]
        self._exits = nn.ModuleDict(
            {name.replace(".", "/"): nn.Linear(_last(item).shape[-1], sum(self._sizes)) for name, item in seen.items()}
        )

    def extra(self) -> nn.Module:
        return self._exits

    def teachers(self) -> Sequence[nn.Module]:
        return self._answers.teachers()

    def to(self, device: str) -> None:
        self._answers.to(device)

    def loss(self, inputs: tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
        with torch.no_grad():
            wanted = floats_of(self._answers.teacher(*inputs))
        last = floats_of(self._answers.student(*inputs))
        total = self._answers.compared(last, wanted, labels)
        taught = tuple(item.detach() for item in last)
        exits = [self._exit(name) for name in self.watch.seen]
        return total + self._weight * torch.stack([self._answers.distance(given, taught) for given in exits]).mean()

    def _exit(self, name: str) -> tuple[Tensor, ...]:
        pooled = _last(self.watch.seen[name].float()).flatten(1, -2).mean(1)
        return tuple(torch.split(self._exits[name.replace(".", "/")](pooled), self._sizes, dim=-1))


def hints(given: Tensor, wanted: Tensor) -> Tensor:
    """Mean square error, as a share of the teacher's variance."""
    return F.mse_loss(given, wanted) / wanted.var().clamp_min(1e-12)


def attention(given: Tensor, wanted: Tensor) -> Tensor:
    """How the strength of features over positions differs, each as a vector of length 1."""
    ours, theirs = (F.normalize(_last(item).square().mean(-1).flatten(1), dim=1) for item in (given, wanted))
    if ours.shape != theirs.shape:
        raise PassFailed(
            f"layers: {ours.shape[1]} positions and the teacher's {theirs.shape[1]}; take layers of one resolution"
        )
    return (ours - theirs).square().sum(1).mean()


ANGLES = 2.0
"""Weight of the angles beside the distances (Park et al. 2019, section 4)."""


def relations(given: Tensor, wanted: Tensor) -> Tensor:
    """How the distances between rows differ, each as a share of their mean, and the angles of all triples of rows."""
    ours, theirs = _rows(given), _rows(wanted)
    distances = F.smooth_l1_loss(_distances(ours), _distances(theirs))
    return distances + ANGLES * F.smooth_l1_loss(_cosines(ours), _cosines(theirs))


BY_LAYER: Mapping[FeatureLoss, Callable[[Tensor, Tensor], Tensor]] = {"attention": attention, "relations": relations}


def _rows(features: Tensor) -> Tensor:
    """A vector for each row: [rows, channels]."""
    return _last(features).flatten(1, -2).mean(1) if features.ndim > 2 else features


def _cosines(rows: Tensor) -> Tensor:
    """Of the angle at each row between the directions to two others, [rows, rows, rows]."""
    directions = F.normalize(rows[None] - rows[:, None], dim=-1)
    return directions @ directions.transpose(1, 2)


def _distances(rows: Tensor) -> Tensor:
    squares = (rows[:, None] - rows[None]).square().sum(-1)
    apart = squares[~torch.eye(len(rows), dtype=torch.bool, device=rows.device)].clamp_min(1e-12).sqrt()
    return apart / apart.mean()


def _last(features: Tensor) -> Tensor:
    """Channels on the last axis: images [N, C, H, W] have them on the second."""
    if features.ndim == 4:
        return features.movedim(1, -1)
    return features if features.ndim > 2 else features[:, None]
