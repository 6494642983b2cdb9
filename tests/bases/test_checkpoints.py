"""Checkpoints that people bring: read without running code, refused with a reason, every tensor in its place."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from service.bases.checkpoints import load_weights, read_state
from service.errors import ConfigError

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


class Touch:
    """Pickled, it creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("wrapper", [(), ("state_dict",), ("checkpoint_of_nothing", "model")])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_wrappers_and_prefixes_of_training_scripts_are_taken_off(
    tmp_path: Path, wrapper: tuple[str, ...], prefix: str
) -> None:
    content: object = {prefix + name: tensor for name, tensor in STATE.items()}
    for key in reversed(wrapper):
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "c.pt")
    module = nn.Linear(3, 2)
    if "checkpoint_of_nothing" in wrapper:
        with pytest.raises(ConfigError, match="holds no tensors"):
            load_weights(module, tmp_path / "c.pt")
        return
    load_weights(module, tmp_path / "c.pt")
    assert torch.equal(module.weight, STATE["weight"])


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "c.safetensors")
    assert torch.equal(read_state(tmp_path / "c.safetensors")["bias"], STATE["bias"])


def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"state_dict": STATE, "callback": Touch(mark)}, tmp_path / "c.pt")
    with pytest.raises(ConfigError, match=r"base\.weights: .*more than tensors, and loading that could run any code"):
        read_state(tmp_path / "c.pt")
    (tmp_path / "c.pkl").write_bytes(pickle.dumps({"callback": Touch(mark)}))
    with pytest.raises(ConfigError, match="is a pickle, which is not read"):
        read_state(tmp_path / "c.pkl")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["c.safetensors", "c.pt", "c.pth"])
def test_damaged_and_missing_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"there is no file .*{name}"):
        read_state(tmp_path / name)
    (tmp_path / name).write_bytes(b"\x89PNG not a checkpoint at all")
    with pytest.raises(ConfigError, match=rf"base\.weights: .*{name}"):
        read_state(tmp_path / name)


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 4), "scale": torch.ones(1)}, tmp_path / "c.safetensors")
    with pytest.raises(ConfigError) as caught:
        load_weights(nn.Linear(3, 2), tmp_path / "c.safetensors")
    text = str(caught.value)
    assert "lacks bias" in text
    assert "has besides scale" in text
    assert "weight is [2, 4], the model wants [2, 3]" in text
