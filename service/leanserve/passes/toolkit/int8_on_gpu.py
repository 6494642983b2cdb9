"""Why graphs in 8-bit integers are not run on GPUs here.

onnxruntime's CUDA provider has the operators that move between integers and floats, but products of integers in
convolutions and linear layers for CPUs alone: it computes QuantizeLinear and DequantizeLinear around float products,
which is slower than without, and copies what is quantized at run time to the host and back (onnxruntime, "Quantize ONNX
models", and its table of operators per provider). TensorRT takes zero points of 0 alone, and ours are not.
"""

from __future__ import annotations

from leanserve.hardware import Hardware


def no_int8_on_gpu(hardware: Hardware) -> str | None:
    """The reason, where variants run on a GPU."""
    if not hardware.on_gpu:
        return None
    return (
        "onnxruntime has no products of 8-bit integers on GPUs, and would be slower than in float there; cast to bf16 "
        "or fp16, quantize_weights, or set device: cpu"
    )
