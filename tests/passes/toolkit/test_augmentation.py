"""Random changes of rows: what each may change, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from leanserve.contracts import TensorSpec
from leanserve.errors import PassFailed
from leanserve.passes.toolkit.augmentation import IMAGES, Augment, augmented, require_augmentable
from leanserve.passes.toolkit.training_options import LabelledTrainingOptions, TrainingOptions

IMAGE = TensorSpec("image", "float32", (1, 8, 8))
IDS = TensorSpec("ids", "int64", (None,))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def squares() -> torch.Tensor:
    """Six images of a bright square on a dark ground."""
    images = torch.full((6, 1, 32, 32), -2.0)
    images[:, :, 12:20, 12:20] = 3
    return images


@pytest.mark.parametrize("name", IMAGES)
def test_each_changes_images_and_leaves_other_inputs_alone(name: Augment) -> None:
    images, ids = squares(), torch.arange(12).view(6, 2)
    images[:, :, 14, 12:15] = 9  # so that its mirror image differs, and so do rows that are mixed
    images = images + torch.arange(6).view(6, 1, 1, 1)
    moved, kept = augmented((name,), (images, ids))
    assert torch.equal(kept, ids)
    assert moved.shape == images.shape
    assert not torch.equal(moved, images)


@pytest.mark.parametrize("name", ["shift", "affine", "flip", "crop"])
def test_the_border_is_repeated_and_not_filled(name: Augment) -> None:
    images = squares()
    (moved,) = augmented((name,), (images,))
    assert torch.equal(moved[:, :, 0, 0], images[:, :, 0, 0])
    assert moved.sum().item() == pytest.approx(images.sum().item(), rel=0.1)


def test_each_image_moves_by_itself_and_only_affine_changes_sizes() -> None:
    shifted, turned = (augmented((name,), (squares(),))[0] for name in ("shift", "affine"))
    assert len({int(image.argmax()) for image in shifted}) > 1
    area = [(warped > 0.5).sum((1, 2, 3)).float().std() for warped in (shifted, turned)]
    assert area[1] > area[0]


def test_a_crop_moves_by_whole_pixels_and_a_flip_is_its_own_inverse() -> None:
    images = torch.randn(5, 2, 16, 16)
    (cropped,) = augmented(("crop",), (images,))
    for before, after in zip(images, cropped, strict=True):
        moves = [before.roll((down, right), (1, 2)) for down in range(-2, 3) for right in range(-2, 3)]
        assert any(torch.equal(move[:, 2:-2, 2:-2], after[:, 2:-2, 2:-2]) for move in moves)
    (flipped,) = augmented(("flip",), (images,))
    assert all(torch.equal(a, b) or torch.equal(a.flip(-1), b) for a, b in zip(images, flipped, strict=True))


def test_a_hole_is_as_large_as_said_and_has_the_mean_colour() -> None:
    images = torch.randn(40, 3, 16, 16)
    (holed,) = augmented(("cutout",), (images,))
    changed = (holed != images).all(1)
    assert changed.sum((1, 2)).max() == 64
    assert changed.any(1).sum(1).max() == changed.any(2).sum(1).max() == 8
    mean = images.mean((2, 3), keepdim=True).expand_as(images)
    assert torch.equal(holed[changed[:, None].expand_as(holed)], mean[changed[:, None].expand_as(holed)])


def test_a_mixture_is_of_two_rows() -> None:
    images = torch.eye(4).view(4, 4, 1, 1)
    (mixed,) = augmented(("mixup",), (images,))
    torch.testing.assert_close(mixed.sum(1).flatten(), torch.ones(4))
    assert ((mixed > 0).sum(1) <= 2).all()


def test_tokens_come_from_the_same_place_of_another_text_and_padding_stays() -> None:
    ids = torch.tensor([[1, 10 + row, 20 + row, 30 + row, 0] for row in range(64)])
    mask = (ids > 0).long()
    changed, kept = augmented(("tokens",), (ids, mask))
    assert torch.equal(kept, mask)
    assert torch.equal(changed[:, 0], ids[:, 0])
    assert 0.02 < (changed != ids)[:, 1:4].float().mean() < 0.25
    for place in (1, 2, 3):
        assert set(changed[:, place].tolist()) <= set(ids[:, place].tolist())


def test_a_change_without_an_input_for_it_is_refused() -> None:
    require_augmentable(("flip",), (IMAGE,))
    require_augmentable(("tokens",), (IDS,))
    with pytest.raises(PassFailed, match=r"augment is 'flip', but no input is an image .*ids \[None\]"):
        require_augmentable(("flip",), (IDS,))
    with pytest.raises(PassFailed, match="augment is 'tokens', but no input is a text"):
        require_augmentable(("tokens",), (IMAGE,))


def test_a_config_gives_a_name_a_list_or_none() -> None:
    given = [TrainingOptions.model_validate({"augment": value}).augment for value in ("flip", ["flip", "crop"], "none")]
    assert given == [("flip",), ("flip", "crop"), ()]
    with pytest.raises(ValidationError, match="augment: mixup leaves rows without a label of their own; drop alpha"):
        LabelledTrainingOptions.model_validate({"augment": ["flip", "mixup"], "alpha": 0.5})
