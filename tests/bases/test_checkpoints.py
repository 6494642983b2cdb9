"""Checkpoints that people bring: read without running code, refused with a reason, every tensor in its place."""

from __future__ import annotations

import argparse
import json
import pickle
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from leanserve.bases.checkpoints import load_weights, read_state, weights_digest
from leanserve.errors import ConfigError

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}
AVERAGE = {name: tensor + 1 for name, tensor in STATE.items()}


class Touch:
    """Pickled, it creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


def loaded(path: Path, key: str | None = None) -> nn.Linear:
    module = nn.Linear(3, 2)
    load_weights(module, path, key)
    return module


@pytest.mark.parametrize("wrapper", [(), ("state_dict",), ("model", "state_dict")])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.module.", "model.net."]
)
def test_wrappers_and_prefixes_of_training_scripts_are_taken_off(
    tmp_path: Path, wrapper: tuple[str, ...], prefix: str
) -> None:
    content: object = {prefix + name: tensor for name, tensor in STATE.items()}
    for key in reversed(wrapper):
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "c.pt")
    assert torch.equal(loaded(tmp_path / "c.pt").weight, STATE["weight"])


def test_prefixes_that_nobody_puts_there_are_chosen_by_the_config(tmp_path: Path) -> None:
    states = {part: {f"backbone.{name}": tensor for name, tensor in STATE.items()} for part in ("student", "teacher")}
    torch.save({"weights": states, "epoch": 3}, tmp_path / "c.pt")
    with pytest.raises(
        ConfigError, match=r"key can choose others of this file: weights.student.backbone, weights.teacher.backbone$"
    ):
        loaded(tmp_path / "c.pt")
    assert torch.equal(loaded(tmp_path / "c.pt", "weights.teacher.backbone").weight, STATE["weight"])


def test_what_is_chosen_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    torch.save({"model": {**STATE, "part": {"weight": torch.ones(2, 3)}}}, tmp_path / "c.pt")
    with pytest.raises(ConfigError, match=r"lacks bias"):
        loaded(tmp_path / "c.pt", "model.part")
    torch.save({"best_acc1": torch.tensor(0.5), **STATE}, tmp_path / "c.pt")
    with pytest.raises(ConfigError, match=r"base.weights_key: .* under 'best_acc1'; there are no keys"):
        loaded(tmp_path / "c.pt", "best_acc1")


def test_a_module_that_is_called_like_a_wrapper_keeps_its_names(tmp_path: Path) -> None:
    module = nn.Sequential(OrderedDict(module=nn.Linear(3, 2)))
    torch.save({f"module.{name}": tensor for name, tensor in module.state_dict().items()}, tmp_path / "c.pt")
    other = nn.Sequential(OrderedDict(module=nn.Linear(3, 2)))
    load_weights(other, tmp_path / "c.pt")
    assert torch.equal(other(torch.ones(1, 3)), module(torch.ones(1, 3)))


def test_compiled_parts_are_found(tmp_path: Path) -> None:
    """torch.compile and FSDP may be around any part of a model."""
    brought = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    compiled = {f"module.{name.replace('.', '._orig_mod.')}": item for name, item in brought.state_dict().items()}
    torch.save(compiled, tmp_path / "c.pt")
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    load_weights(module, tmp_path / "c.pt")
    assert torch.equal(module(torch.ones(1, 3)), brought(torch.ones(1, 3)))


def test_a_model_in_parts_is_put_together(tmp_path: Path) -> None:
    """A mapping per part, one of them called as if it were the whole."""
    whole = nn.ModuleDict({"net": nn.Linear(3, 2), "head": nn.Linear(2, 2)})
    torch.save({"model": {name: part.state_dict() for name, part in whole.items()}, "epoch": 1}, tmp_path / "c.pt")
    other = nn.ModuleDict({"net": nn.Linear(3, 2), "head": nn.Linear(2, 2)})
    assert load_weights(other, tmp_path / "c.pt") == ()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    assert torch.equal(loaded(tmp_path / "c.pt", "model.net").weight, whole.state_dict()["net.weight"])


@pytest.mark.parametrize(
    ("plain", "average"), [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema"), ("net", "ema")]
)
def test_averaged_weights_are_taken_and_the_others_can_be_chosen(tmp_path: Path, plain: str, average: str) -> None:
    torch.save({plain: STATE, average: {"module": AVERAGE}, "epoch": 3}, tmp_path / "c.pt")
    module = nn.Linear(3, 2)
    told = (f"weights are {average}.module, not {plain} (base.weights_key)",)
    assert load_weights(module, tmp_path / "c.pt") == told
    assert torch.equal(module.weight, AVERAGE["weight"])
    assert load_weights(module, tmp_path / "c.pt", plain) == (), "nothing to tell of a choice of the config's own"
    assert torch.equal(module.weight, STATE["weight"])
    with pytest.raises(ConfigError, match=rf"base.weights_key: .* under 'best'; there are {plain}, {average}"):
        load_weights(module, tmp_path / "c.pt", "best")


def test_an_average_without_buffers_is_told_with_the_other_choice(tmp_path: Path) -> None:
    torch.save({"model": STATE, "ema": {"weight": AVERAGE["weight"]}}, tmp_path / "c.pt")
    with pytest.raises(ConfigError, match=r"lacks bias\. base.weights_key can choose others of this file: model$"):
        loaded(tmp_path / "c.pt")


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "c.safetensors")
    assert torch.equal(read_state(tmp_path / "c.safetensors")["bias"], STATE["bias"])


class Tied(nn.Module):
    """A language model's shape: the table of the words is also that of the answers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.words.weight


class Untied(nn.Module):
    """As `Tied`, with two tables."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)


@pytest.mark.parametrize("kind", [Tied, Untied])
def test_tensors_that_are_stored_once_are_put_to_all_their_places(tmp_path: Path, kind: type[Tied | Untied]) -> None:
    brought = Tied()
    save_model(brought, str(tmp_path / "a.safetensors"))
    save_file({"words.weight": brought.words.weight}, tmp_path / "b.safetensors")
    for name in ("a", "b") if kind is Tied else ("a",):
        module = kind()
        load_weights(module, tmp_path / f"{name}.safetensors")
        assert torch.equal(module.words.weight, brought.words.weight)
        assert torch.equal(module.head.weight, brought.words.weight)


def test_one_tensor_of_two_values_is_refused(tmp_path: Path) -> None:
    save_file({"words.weight": torch.ones(5, 3), "head.weight": torch.zeros(5, 3)}, tmp_path / "c.safetensors")
    with pytest.raises(ConfigError, match=r"differ, though they are one tensor in the model: head.weight and words"):
        load_weights(Tied(), tmp_path / "c.safetensors")


def imagenet(module: nn.Module) -> Any:
    """As the example of torch for ImageNet saves."""
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    state = {"epoch": 3, "arch": "resnet18", "state_dict": nn.DataParallel(module).state_dict()}
    parts = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    return state | {"best_acc1": torch.tensor(71.5)} | parts


def timm(module: nn.Module) -> Any:
    """As timm's training script saves."""
    arguments = argparse.Namespace(lr=0.1, data=Path("data"), seeds=(1, 2), metric=np.float32(0.5))
    return {"epoch": 3, "arch": "net", "state_dict": module.state_dict(), "args": arguments, "metric": np.float64(0.9)}


def averaged(module: nn.Module) -> Any:
    """As people save torch's AveragedModel."""
    return AveragedModel(module).state_dict()


def scores(module: nn.Module) -> Any:
    """With numbers and arrays of numpy in containers of Python's library."""
    history = defaultdict(list, loss=[np.float64(1.5), np.int64(3)])
    return {"model": module.state_dict(), "history": history, "random": np.random.RandomState(0).get_state()}


@pytest.mark.parametrize("save", [imagenet, timm, averaged, scores])
@pytest.mark.parametrize("legacy", ["zip", "legacy"])
def test_what_training_scripts_save_is_read(tmp_path: Path, save: Callable[[nn.Module], Any], legacy: str) -> None:
    brought = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    content = save(brought)
    torch.save(content, tmp_path / "c.pth.tar", _use_new_zipfile_serialization=legacy == "zip")
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    assert load_weights(module, tmp_path / "c.pth.tar") == ()
    rows = torch.randn(5, 3)
    assert torch.equal(module(rows), brought.eval()(rows))


def test_a_configuration_of_omegaconf_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("omegaconf.dictconfig")
    config = type("DictConfig", (), {"__module__": "omegaconf.dictconfig", "__setstate__": lambda self, state: None})
    library.DictConfig = config  # type: ignore[attr-defined]
    made = config()
    made.content = {"lr": 0.1, "type": int}
    monkeypatch.setitem(sys.modules, "omegaconf", ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", library)
    torch.save({"state_dict": STATE, "hyper_parameters": made}, tmp_path / "c.ckpt")
    assert torch.equal(loaded(tmp_path / "c.ckpt").weight, STATE["weight"])


def test_norms_of_old_versions_do_without_their_counters(tmp_path: Path) -> None:
    brought = nn.BatchNorm1d(3)
    old = {name: tensor for name, tensor in brought.state_dict().items() if name != "num_batches_tracked"}
    torch.save(old, tmp_path / "c.pt")
    load_weights(nn.BatchNorm1d(3), tmp_path / "c.pt")
    torch.save({"weight": old["weight"], "bias": old["bias"]}, tmp_path / "c.pt")
    with pytest.raises(ConfigError, match="lacks running_mean, running_var"):
        load_weights(nn.BatchNorm1d(3), tmp_path / "c.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({name: tensor.to(dtype) for name, tensor in STATE.items()}, tmp_path / "c.pt")
    weight = loaded(tmp_path / "c.pt").weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, STATE["weight"])


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2, 3, dtype=torch.int8), "bias": torch.ones(2)}, tmp_path / "c.pt")
    with pytest.raises(ConfigError, match="weight is int8, the model wants float32"):
        loaded(tmp_path / "c.pt")


def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"state_dict": STATE, "callback": Touch(mark)}, tmp_path / "c.pt")
    with pytest.raises(ConfigError, match=r"base\.weights: .*more than tensors, and loading that could run any code"):
        read_state(tmp_path / "c.pt")
    (tmp_path / "c.pkl").write_bytes(pickle.dumps({"callback": Touch(mark)}))
    with pytest.raises(ConfigError, match="is a pickle, which is not read"):
        read_state(tmp_path / "c.pkl")
    assert not mark.exists()


@pytest.mark.parametrize("legacy", ["zip", "legacy"])
def test_what_is_not_read_is_named_with_the_remedy(tmp_path: Path, legacy: str) -> None:
    torch.save(nn.Linear(3, 2), tmp_path / "c.pt", _use_new_zipfile_serialization=legacy == "zip")
    with pytest.raises(ConfigError, match=r"run any code \(.*torch.nn.modules.linear.Linear.*save_model"):
        read_state(tmp_path / "c.pt")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_archives_with_code_pointers_and_other_things_are_told(tmp_path: Path) -> None:
    scripted = torch.jit.trace(nn.Linear(3, 2), torch.ones(1, 3))  # type: ignore[no-untyped-call]
    torch.jit.save(scripted, str(tmp_path / "script.pt"))
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    torch.save([STATE["weight"]], tmp_path / "list.pt")
    torch.save({"epoch": 3, "weights": {"w": np.ones(3)}}, tmp_path / "arrays.pt")
    torch.save(STATE, tmp_path / "protocol.pt", pickle_protocol=4)
    for name, reason in {
        "script": r"is a TorchScript archive.*torch.jit.load\(FILE\).state_dict\(\)",
        "pointer": "is a pointer of Git LFS.*git lfs pull",
        "list": r"holds a list, not a state dict\. .*save_model",
        "arrays": r"holds no tensors with names \(its keys: epoch, weights\)\. .*save_model",
        "protocol": r"is not read: only the usual format of torch.save \(pickle protocol 2\) can be read",
    }.items():
        with pytest.raises(ConfigError, match=rf"base\.weights: .*{name}.pt {reason}"):
            read_state(tmp_path / f"{name}.pt")


@pytest.mark.parametrize("name", ["c.safetensors", "c.pt", "c.pth"])
def test_damaged_and_missing_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"there is no file .*{name}"):
        read_state(tmp_path / name)
    (tmp_path / name).write_bytes(b"\x89PNG not a checkpoint at all")
    with pytest.raises(ConfigError, match=rf"base\.weights: .*{name}"):
        read_state(tmp_path / name)


def test_tensors_that_the_model_has_no_place_for_are_told(tmp_path: Path) -> None:
    """A loss with weights of its own, or a second head, that only training used."""
    torch.save({"step": 9, "model_state": {**STATE, "similarity_weight": torch.ones(1)}}, tmp_path / "c.pt")
    module = nn.Linear(3, 2)
    told = "the file has weights that the model has no place for: similarity_weight"
    assert load_weights(module, tmp_path / "c.pt") == (told,)
    assert torch.equal(module.weight, STATE["weight"])


def test_weights_under_a_key_that_nobody_knows_are_found_by_what_fits(tmp_path: Path) -> None:
    discriminator = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
    torch.save({"net_g": STATE, "net_d": discriminator}, tmp_path / "c.pt")
    assert torch.equal(loaded(tmp_path / "c.pt").weight, STATE["weight"])
    torch.save({"net_g": STATE, "net_h": AVERAGE}, tmp_path / "c.pt")
    with pytest.raises(ConfigError, match=r"base.weights_key can choose others of this file: net_g, net_h$"):
        loaded(tmp_path / "c.pt")


SHARDS = {"one-00001-of-00002": {"weight": STATE["weight"]}, "one-00002-of-00002": {"bias": STATE["bias"]}}


@pytest.mark.parametrize("named", ["the index", "the first shard", "the folder"])
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_shards_are_one_checkpoint(tmp_path: Path, ending: str, named: str) -> None:
    for name, state in SHARDS.items():
        path = tmp_path / f"{name}{ending}"
        save_file(state, path) if ending == ".safetensors" else torch.save({"model": state}, path)
    index = tmp_path / f"one{ending}.index.json"
    index.write_text(json.dumps({"weight_map": {key: f"{name}{ending}" for name, s in SHARDS.items() for key in s}}))
    first = tmp_path / f"one-00001-of-00002{ending}"
    asked = {"the index": index, "the first shard": first, "the folder": tmp_path}[named]
    module = nn.Linear(3, 2)
    assert load_weights(module, asked) == ()
    assert torch.equal(module.weight, STATE["weight"])
    assert torch.equal(module.bias, STATE["bias"])
    before = weights_digest(asked)
    second = first.with_name(f"one-00002-of-00002{ending}")
    second.write_bytes(second.read_bytes() + b" ")
    assert weights_digest(asked) != before
    second.unlink()
    with pytest.raises(ConfigError, match=r"cut into 2 files, of which one-00002-of-00002.* is not beside it"):
        load_weights(module, asked)


def test_shards_that_cannot_be_told_are_refused(tmp_path: Path) -> None:
    index = tmp_path / "m.safetensors.index.json"
    for content, said in (("[]", "is no index"), ('{"weight_map": {"a": "../x"}}', "does not lie beside it")):
        index.write_text(content)
        with pytest.raises(ConfigError, match=said):
            load_weights(nn.Linear(2, 2), index)
    index.unlink()
    with pytest.raises(ConfigError, match="not exactly one file with weights"):
        load_weights(nn.Linear(2, 2), tmp_path)
    (tmp_path / "__0_0.distcp").touch()
    with pytest.raises(ConfigError, match="distributed checkpoint; make one file of it"):
        load_weights(nn.Linear(2, 2), tmp_path)


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 4), "scale": torch.ones(1)}, tmp_path / "c.safetensors")
    with pytest.raises(ConfigError) as caught:
        load_weights(nn.Linear(3, 2), tmp_path / "c.safetensors")
    text = str(caught.value)
    assert "lacks bias" in text
    assert "has besides scale" in text
    assert "weight is [2, 4], the model wants [2, 3]" in text
