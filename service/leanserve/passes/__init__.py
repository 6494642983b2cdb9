"""Every pass, written out by hand: `AnyPass` is the discriminated union for the config, `ALL` its members."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from leanserve.passes.base import Pass
from leanserve.passes.families.architecture.student import Student
from leanserve.passes.families.distill.distill import Distill
from leanserve.passes.families.distill.distill_datafree import DistillDatafree
from leanserve.passes.families.distill.distill_ensemble import DistillEnsemble
from leanserve.passes.families.distill.distill_features import DistillFeatures
from leanserve.passes.families.distill.train_flat import TrainFlat
from leanserve.passes.families.lowrank.lowrank_conv import LowrankConv
from leanserve.passes.families.lowrank.lowrank_linear import LowrankLinear
from leanserve.passes.families.merge.merge import Merge
from leanserve.passes.families.merge.merge_lora import MergeLora
from leanserve.passes.families.merge.rebasin import Rebasin
from leanserve.passes.families.precision.cast import Cast
from leanserve.passes.families.precision.fp8 import Fp8
from leanserve.passes.families.precision.sparse_2_4 import Sparse24
from leanserve.passes.families.precision.store_weights import StoreWeights
from leanserve.passes.families.prune.lottery_ticket import LotteryTicket
from leanserve.passes.families.prune.prune_at_init import PruneAtInit
from leanserve.passes.families.prune.prune_channels import PruneChannels
from leanserve.passes.families.prune.prune_heads import PruneHeads
from leanserve.passes.families.prune.prune_layers import PruneLayers
from leanserve.passes.families.prune.prune_magnitude import PruneMagnitude
from leanserve.passes.families.prune.prune_movement import PruneMovement
from leanserve.passes.families.prune.prune_oneshot import PruneOneshot
from leanserve.passes.families.quantize.qat import Qat
from leanserve.passes.families.quantize.quantize_dynamic import QuantizeDynamic
from leanserve.passes.families.quantize.quantize_select import QuantizeSelect
from leanserve.passes.families.quantize.quantize_static import QuantizeStatic
from leanserve.passes.families.quantize.quantize_weights import QuantizeWeights
from leanserve.passes.families.quantize.smooth import Smooth
from leanserve.passes.families.runtime.aot_inductor import AotInductor
from leanserve.passes.families.runtime.channels_last import ChannelsLast
from leanserve.passes.families.runtime.fold_bn import FoldBn
from leanserve.passes.families.runtime.onnxruntime import OnnxRuntime
from leanserve.passes.families.runtime.openvino import OpenVino
from leanserve.passes.families.runtime.torch_compile import TorchCompile

AnyPass = Annotated[
    Student
    | PruneChannels
    | PruneLayers
    | PruneHeads
    | LowrankConv
    | LowrankLinear
    | PruneMagnitude
    | PruneOneshot
    | PruneMovement
    | PruneAtInit
    | LotteryTicket
    | Distill
    | DistillFeatures
    | DistillDatafree
    | DistillEnsemble
    | TrainFlat
    | Merge
    | Rebasin
    | MergeLora
    | FoldBn
    | Smooth
    | Cast
    | StoreWeights
    | Fp8
    | Sparse24
    | QuantizeDynamic
    | QuantizeStatic
    | QuantizeSelect
    | Qat
    | QuantizeWeights
    | ChannelsLast
    | OnnxRuntime
    | OpenVino
    | TorchCompile
    | AotInductor,
    Field(discriminator="kind"),
]

ALL: tuple[type[Pass], ...] = get_args(get_args(AnyPass)[0])
