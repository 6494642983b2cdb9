"""A training that two processes run together, by rows or by weights: the weights of one with the same batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from builds import constructed, measure_nothing
from leanserve.artifacts.load import load_model
from leanserve.artifacts.store import ArtifactStore
from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.config.schema import read_config
from leanserve.contracts import TorchModel

MODEL = """
import torch
def network():
    generator = torch.Generator().manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    for weight in net.parameters():
        torch.nn.init.uniform_(weight, -0.5, 0.5, generator=generator)
    return net
"""
CONFIG = """
base:
  python: network:network
  inputs: {x: {dtype: float32, shape: [8]}}
  outputs: {output: logits}
data: {arrays: rows.npz, splits: {calibration: 16, gate: 16}}
variants:
  - name: alone
    passes: [FACTORS, {kind: distill, epochs: 3, batch: 16, precision: float32}]
  - name: together
    passes: [FACTORS, {kind: distill, epochs: 3, batch: 16, precision: float32, processes: 2}]
  - name: split
    passes: [FACTORS, {kind: distill, epochs: 3, batch: 16, precision: float32, processes: 2, split: weights}]
""".replace("FACTORS", "{kind: lowrank_linear, rank: 2, method: svd}")


@pytest.mark.soak
def test_two_processes_train_to_the_weights_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "network.py").write_text(MODEL)
    (tmp_path / "config.yaml").write_text(CONFIG)
    np.savez(tmp_path / "rows.npz", x=np.random.default_rng(0).standard_normal((150, 8)).astype(np.float32))
    measure_nothing(monkeypatch)
    config = read_config(tmp_path / "config.yaml")
    base = open_base(Origin(base=config.base, data=config.data, folder=tmp_path))
    store = ArtifactStore(tmp_path / "cache")
    recipes, said = constructed(store, config, base)
    alone, *shared = (load_model(store, base, keys[-1]) for keys in recipes)
    assert "cannot be applied" not in said
    assert isinstance(alone, TorchModel)
    untrained = load_model(store, base, recipes[0][-2])
    assert isinstance(untrained, TorchModel)
    for name, weight in alone.module.named_parameters():
        assert not torch.equal(weight, untrained.module.get_parameter(name))
        for both in shared:
            assert isinstance(both, TorchModel)
            torch.testing.assert_close(weight, both.module.get_parameter(name), rtol=1e-4, atol=1e-5)
