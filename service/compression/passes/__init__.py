"""Every pass, written out by hand: `AnyPass` is the discriminated union for the config, `ALL` its members."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from service.compression.passes.base import Pass
from service.compression.passes.distill.distill import Distill
from service.compression.passes.lowrank.lowrank_conv import LowrankConv
from service.compression.passes.lowrank.lowrank_linear import LowrankLinear
from service.compression.passes.precision.cast import Cast
from service.compression.passes.prune.prune_channels import PruneChannels
from service.compression.passes.quantize.quantize_dynamic import QuantizeDynamic
from service.compression.passes.quantize.quantize_static import QuantizeStatic
from service.compression.passes.runtime.channels_last import ChannelsLast
from service.compression.passes.runtime.fold_bn import FoldBn
from service.compression.passes.runtime.onnxruntime import OnnxRuntime
from service.compression.passes.runtime.torch_compile import TorchCompile

AnyPass = Annotated[
    PruneChannels
    | LowrankConv
    | LowrankLinear
    | Distill
    | FoldBn
    | Cast
    | QuantizeDynamic
    | QuantizeStatic
    | ChannelsLast
    | OnnxRuntime
    | TorchCompile,
    Field(discriminator="kind"),
]

ALL: tuple[type[Pass], ...] = get_args(get_args(AnyPass)[0])
