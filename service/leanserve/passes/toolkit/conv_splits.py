"""Five ways to write a convolution as a chain of cheaper ones, for any stride, padding, dilation.

`Spatial`: k x 1 then 1 x k (Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions",
2014). `Channel`: k x k with few outputs, then 1 x 1 (Zhang et al., "Accelerating Very Deep Convolutional Networks",
2015). `Tucker2`: 1 x 1, a small k x k, 1 x 1 (Kim et al., "Compression of Deep CNNs for Fast and Low Power Mobile
Applications", 2016). These three are exact at full rank. `Cp`: 1 x 1, k x 1 and 1 x k on each channel alone, 1 x 1
(Lebedev et al. 2015), and `Depthwise`: 1 x 1, k x k on each channel alone, 1 x 1 (Guo et al., "Network Decoupling",
2018), which has a layer less and costs no more where kernels are small.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanserve.passes.toolkit.activations import Moments
from leanserve.passes.toolkit.cp_factors import cp_factors, fitted_factors
from leanserve.passes.toolkit.factors import Basis, cholesky_scale, input_basis, output_basis, regress
from leanserve.passes.toolkit.layer_calls import Call, positions
from leanserve.passes.toolkit.layer_times import seconds_of
from leanserve.passes.toolkit.rank_ladders import Ranks

Approximate: TypeAlias = Literal["weight", "output"]


def patches(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """What each output position of `conv` sees: images [N, C, H, W] -> vectors [positions, C * kh * kw]."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    unfolded = F.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)
    return unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])


def pixels(y: Tensor) -> Tensor:
    """Images [N, C, H, W] -> vectors [N * H * W, C]."""
    return y.movedim(1, -1).reshape(-1, y.shape[1])


class ConvSplit(ABC):
    """One convolution on its way to a chain of cheaper ones, and what calibration data says about it."""

    ranks: ClassVar[int] = 1
    """How many ranks are to be chosen."""
    looks_at_input: ClassVar[bool] = False
    looks_at_output: ClassVar[bool] = False

    def __init__(self, conv: nn.Conv2d, calls: Sequence[Call] = ()) -> None:
        self.conv = conv
        self.calls = calls
        self.weight = conv.weight.detach().double()
        self.convs: list[nn.Conv2d] = []
        """The chain, once `fill` has run."""
        self._first = self.chain((1,) * self.ranks, bias=False)[0]
        self._inputs, self._outputs, self._answers = Moments(), Moments(), Moments()

    @staticmethod
    def unfit(conv: nn.Conv2d) -> str | None:
        """Why this convolution cannot be split this way; `None` if it can."""
        return "grouped convolution" if conv.groups != 1 else None

    @abstractmethod
    def chain(self, ranks: Ranks, **factory: Any) -> list[nn.Conv2d]:
        """The convolutions for these ranks, without weights; `factory` holds `bias` (of the last) and `device`."""

    @abstractmethod
    def bases(self, approximate: Approximate) -> tuple[Basis, ...]:
        """One basis for each rank: of the weight alone, or of the outputs that the data looked at has caused."""

    @abstractmethod
    def weights(self, bases: Sequence[Basis], ranks: Ranks) -> list[Tensor]:
        """The weights of the chain."""

    @property
    @abstractmethod
    def sides(self) -> tuple[tuple[int, int], ...]:
        """Of the matrix of weights behind each rank."""

    @property
    def dense(self) -> int:
        """MACs per row of the convolution as it is."""
        return positions(self.calls, channel_axis=-3) * self.conv.weight.numel()

    def cost(self, ranks: Ranks) -> int:
        """MACs per row of the chain with these ranks."""
        total = 0
        chain = self.chain(ranks, bias=False, device="meta")
        for call in self.calls:
            x = torch.empty(call.input, device="meta")
            for conv in chain:
                x = conv(x)
                total += conv.weight.numel() * x.shape[-1] * x.shape[-2]
        return total

    def seconds(self, ranks: Ranks) -> float:
        """Of the chain with these ranks for a row, measured; without any, of the convolution as it is."""
        chain = nn.Sequential(*self.chain(ranks, bias=False)) if ranks else self.conv
        return seconds_of(chain.eval(), self.calls, self.conv.in_channels)

    def look(self, x: Tensor, y: Tensor) -> None:
        """Take in one call of the convolution."""
        if self.looks_at_input:
            self._inputs.add(patches(x, self._first))
        if self.looks_at_output:
            self._outputs.add(pixels(y))

    def fill(self, bases: Sequence[Basis], ranks: Ranks, *, bias: bool) -> None:
        """Make the chain with its weights; the last convolution has the bias."""
        self.convs = self.chain(ranks, bias=bias)
        with torch.no_grad():
            for conv, weight in zip(self.convs, self.weights(bases, ranks), strict=True):
                conv.weight.copy_(weight)
            if (last := self.convs[-1]).bias is not None:
                last.bias.copy_(torch.zeros_like(last.bias) if self.conv.bias is None else self.conv.bias)

    def trial(self, bases: Sequence[Basis], ranks: Ranks, *, bias: bool) -> Self:
        """The same convolution with a chain of its own, by what was looked at here."""
        made = copy.copy(self)
        made._answers = Moments()
        made.fill(bases, ranks, bias=bias)
        return made

    def compare(self, x: Tensor, y: Tensor) -> None:
        """Take in what the last convolution of the chain sees, beside what it should answer."""
        for conv in self.convs[:-1]:
            x = conv(x)
        self._answers.add(torch.cat([patches(x, self.convs[-1]), pixels(y)], dim=1))

    def refit(self) -> None:
        """Make the last convolution the least-squares answer to what was compared; its bias keeps the mean."""
        last = self.convs[-1]
        features = last.weight[0].numel()
        solution = regress(self._answers.covariance, features)
        mean = self._answers.mean
        with torch.no_grad():
            last.weight.copy_(solution.T.reshape(last.weight.shape))
            if last.bias is not None:
                last.bias.copy_(mean[features:] - mean[:features] @ solution)

    def _input_basis(self, matrix: Tensor, approximate: Approximate) -> Basis:
        return input_basis(matrix, None if approximate == "weight" else cholesky_scale(self._inputs.covariance))

    def _output_basis(self, approximate: Approximate) -> Basis:
        return (
            input_basis(self.weight.flatten(1)) if approximate == "weight" else output_basis(self._outputs.covariance)
        )

    def _part(self, channels_in: int, channels_out: int, axes: Sequence[int], **factory: Any) -> nn.Conv2d:
        """A convolution with our geometry along `axes` (0 is height, 1 is width) and kernel 1 along the others."""
        conv = self.conv

        def along(values: Sequence[int], neutral: int) -> tuple[int, int]:
            return (values[0] if 0 in axes else neutral, values[1] if 1 in axes else neutral)

        return nn.Conv2d(
            channels_in,
            channels_out,
            kernel_size=along(conv.kernel_size, 1),
            stride=along(conv.stride, 1),
            padding=conv.padding if isinstance(conv.padding, str) else along(conv.padding, 0),
            dilation=along(conv.dilation, 1),
            padding_mode=conv.padding_mode,
            **factory,
        )


class Spatial(ConvSplit):
    """A column of kernels, then a row of kernels."""

    looks_at_input = True

    @staticmethod
    def unfit(conv: nn.Conv2d) -> str | None:
        return ConvSplit.unfit(conv) or ("its kernel has one row or column" if 1 in conv.kernel_size else None)

    def chain(self, ranks: Ranks, **factory: Any) -> list[nn.Conv2d]:
        (rank,) = ranks
        column = self._part(self.conv.in_channels, rank, (0,), **{**factory, "bias": False})
        return [column, self._part(rank, self.conv.out_channels, (1,), **factory)]

    def bases(self, approximate: Approximate) -> tuple[Basis, ...]:
        return (self._input_basis(self._matrix(), approximate),)

    @property
    def sides(self) -> tuple[tuple[int, int], ...]:
        rows, columns = self._matrix().shape
        return ((rows, columns),)

    def weights(self, bases: Sequence[Basis], ranks: Ranks) -> list[Tensor]:
        (basis,), (rank,) = bases, ranks
        outputs, inputs, height, width = self.weight.shape
        column = basis.encode[:, :rank].T.reshape(rank, inputs, height, 1)
        row = (basis.decode[:rank] @ self._matrix()).reshape(rank, outputs, 1, width)
        return [column, row.transpose(0, 1)]

    def _matrix(self) -> Tensor:
        """[inputs * height, outputs * width]"""
        return self.weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


class Channel(ConvSplit):
    """The same kernels for fewer outputs, then their mixture."""

    looks_at_output = True

    def chain(self, ranks: Ranks, **factory: Any) -> list[nn.Conv2d]:
        (rank,) = ranks
        kernels = self._part(self.conv.in_channels, rank, (0, 1), **{**factory, "bias": False})
        return [kernels, nn.Conv2d(rank, self.conv.out_channels, 1, **factory)]

    def bases(self, approximate: Approximate) -> tuple[Basis, ...]:
        return (self._output_basis(approximate),)

    @property
    def sides(self) -> tuple[tuple[int, int], ...]:
        return ((len(self.weight), self.weight[0].numel()),)

    def weights(self, bases: Sequence[Basis], ranks: Ranks) -> list[Tensor]:
        (basis,), (rank,) = bases, ranks
        kernels = torch.einsum("rn,nchw->rchw", basis.decode[:rank], self.weight)
        return [kernels, basis.encode[:, :rank, None, None]]


class Tucker2(ConvSplit):
    """Fewer inputs, small kernels between few channels, then their mixture."""

    ranks = 2
    looks_at_input = True
    looks_at_output = True

    @staticmethod
    def unfit(conv: nn.Conv2d) -> str | None:
        return ConvSplit.unfit(conv) or ("its kernel is 1 x 1" if tuple(conv.kernel_size) == (1, 1) else None)

    def chain(self, ranks: Ranks, **factory: Any) -> list[nn.Conv2d]:
        rank_in, rank_out = ranks
        inner = {**factory, "bias": False}
        return [
            nn.Conv2d(self.conv.in_channels, rank_in, 1, **inner),
            self._part(rank_in, rank_out, (0, 1), **inner),
            nn.Conv2d(rank_out, self.conv.out_channels, 1, **factory),
        ]

    def bases(self, approximate: Approximate) -> tuple[Basis, ...]:
        inputs = self.weight.transpose(0, 1).flatten(1)
        return (self._input_basis(inputs, approximate), self._output_basis(approximate))

    @property
    def sides(self) -> tuple[tuple[int, int], ...]:
        outputs, inputs = self.weight.shape[:2]
        return ((inputs, self.weight.numel() // inputs), (outputs, self.weight.numel() // outputs))

    def weights(self, bases: Sequence[Basis], ranks: Ranks) -> list[Tensor]:
        inputs, outputs = bases
        rank_in, rank_out = ranks
        core = torch.einsum("qn,pc,nchw->qphw", outputs.decode[:rank_out], inputs.decode[:rank_in], self.weight)
        return [inputs.encode[:, :rank_in].T[:, :, None, None], core, outputs.encode[:, :rank_out, None, None]]


class _Products(ConvSplit):
    """A sum of products of vectors, each of which is a channel of the chain."""

    def __init__(self, conv: nn.Conv2d, calls: Sequence[Call] = ()) -> None:
        super().__init__(conv, calls)
        self._seen = Moments()

    @staticmethod
    def unfit(conv: nn.Conv2d) -> str | None:
        return ConvSplit.unfit(conv) or ("its kernel is 1 x 1" if tuple(conv.kernel_size) == (1, 1) else None)

    @property
    @abstractmethod
    def kernel(self) -> Tensor:
        """The weight with a dimension for each vector of a product; the first one are the outputs."""

    def look(self, x: Tensor, y: Tensor) -> None:  # noqa: ARG002 - what it should answer follows from what it sees
        self._seen.add(patches(x, self.conv))

    def bases(self, approximate: Approximate) -> tuple[Basis, ...]:  # noqa: ARG002 - of the weight alone
        """The energies of a sum of as many products as are worth it, of the weight in any case. A sum may have more of
        them than the kernel has outputs, and need them: they are no orthogonal directions."""
        kernel = self.kernel
        most = max(1, kernel.numel() // sum(kernel.shape))
        # Each factor has a root of a product's length.
        lengths = cp_factors(kernel, most)[-1].square().sum(0) ** kernel.ndim
        none = torch.empty(0, dtype=torch.float64)
        return (Basis(none, none, lengths.sort(descending=True).values),)

    @property
    def sides(self) -> tuple[tuple[int, int], ...]:
        return ()

    def _factors(self, rank: int) -> list[Tensor]:
        """By the answers to what was looked at, if that was; a sum of this rank, no cut of a longer one."""
        factors = cp_factors(self.kernel, rank)
        return fitted_factors(self.kernel, factors, self._seen.covariance) if self._seen.count else factors


class Cp(_Products):
    """Each of a few channels by itself: a mixture of the inputs, a column, a row, a mixture of them."""

    @property
    def kernel(self) -> Tensor:
        return self.weight

    def chain(self, ranks: Ranks, **factory: Any) -> list[nn.Conv2d]:
        (rank,) = ranks
        inner = {**factory, "bias": False}
        return [
            nn.Conv2d(self.conv.in_channels, rank, 1, **inner),
            self._part(rank, rank, (0,), groups=rank, **inner),
            self._part(rank, rank, (1,), groups=rank, **inner),
            nn.Conv2d(rank, self.conv.out_channels, 1, **factory),
        ]

    def weights(self, bases: Sequence[Basis], ranks: Ranks) -> list[Tensor]:  # noqa: ARG002
        outputs, inputs, column, row = self._factors(ranks[0])
        return [inputs.T[:, :, None, None], column.T[:, None, :, None], row.T[:, None, None], outputs[:, :, None, None]]


class Depthwise(_Products):
    """Each of a few channels by itself: a mixture of the inputs, a kernel, a mixture of them."""

    @property
    def kernel(self) -> Tensor:
        return self.weight.flatten(2)

    def chain(self, ranks: Ranks, **factory: Any) -> list[nn.Conv2d]:
        (rank,) = ranks
        inner = {**factory, "bias": False}
        return [
            nn.Conv2d(self.conv.in_channels, rank, 1, **inner),
            self._part(rank, rank, (0, 1), groups=rank, **inner),
            nn.Conv2d(rank, self.conv.out_channels, 1, **factory),
        ]

    def weights(self, bases: Sequence[Basis], ranks: Ranks) -> list[Tensor]:  # noqa: ARG002
        outputs, inputs, kernels = self._factors(ranks[0])
        shape = (ranks[0], 1, *self.conv.kernel_size)
        return [inputs.T[:, :, None, None], kernels.T.reshape(shape), outputs[:, :, None, None]]


SCHEMES: Mapping[str, type[ConvSplit]] = {
    "spatial": Spatial,
    "channel": Channel,
    "tucker2": Tucker2,
    "cp": Cp,
    "depthwise": Depthwise,
}
