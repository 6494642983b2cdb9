"""Untrained weights: what a network was before it was trained, as far as anybody can know it."""

from __future__ import annotations

import torch
from torch import nn


def begin_anew(module: nn.Module, seed: int) -> None:
    """Begin anew, in place: layers as torch makes them, parameters of no layer as small random numbers."""
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(seed)
        reset = set()
        for child in module.modules():
            if callable(begin := getattr(child, "reset_parameters", None)):
                begin()
                reset |= {id(weight) for weight in child.parameters(recurse=False)}
        for weight in module.parameters():
            if id(weight) not in reset:
                weight.normal_(std=0.02)
