"""What lies in folders: endings that lie, links, what systems leave behind, and what is no image."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from animals import save
from leanserve.bases.datasets.image_folder import ImageFolder, by_ending, image_folder
from leanserve.codecs.image_formats import FORMAT_NAMES, FormatName
from leanserve.errors import ConfigError


def look(root: Path, formats: tuple[FormatName, ...] = FORMAT_NAMES) -> ImageFolder:
    return image_folder(root, formats, "data.images")


def names(found: ImageFolder) -> list[str]:
    return [path.relative_to(found.root).as_posix() for path in found.files]


def test_content_tells_an_image_whatever_its_ending_says(tmp_path: Path) -> None:
    content = save(tmp_path, "a/true.png", 1)
    for name in ("a/called.jpg", "a/SHOUTED.PNG", "a/bare", "a/two.dots.JpEg", "a/x.tif"):
        (tmp_path / name).write_bytes(content)
    found = look(tmp_path)
    assert names(found) == ["a/SHOUTED.PNG", "a/bare", "a/called.jpg", "a/true.png", "a/two.dots.JpEg", "a/x.tif"]
    assert found.skipped == ()
    assert found.damaged == {}


def test_files_of_other_endings_are_skipped_even_if_they_begin_like_images(tmp_path: Path) -> None:
    """Raw files of cameras are TIFF files whose first page is a preview; unfinished downloads are cut."""
    content = save(tmp_path, "a.png", 1)
    for name in ("raw.dng", "raw.NEF", "b.png.part", "c.jpg.crdownload", "README", "labels.csv", "d.heic"):
        (tmp_path / name).write_bytes(content if name != "README" else b"hello")
    found = look(tmp_path)
    assert names(found) == ["a.png"]
    assert by_ending(found.skipped) == "1 .crdownload, 1 .csv, 1 .dng, 1 .heic, 1 .nef, 1 .part, 1 without an ending"
    assert found.seen().startswith("1 images: 1 .png; 7 other files are skipped: 1 .crdownload, ")


def test_what_systems_leave_behind_is_not_seen(tmp_path: Path) -> None:
    for name in ("cat/1.png", ".Trash/2.png", "cat/._1.png", "__MACOSX/cat/1.png", "cat/.DS_Store.png", ".git/x/3.png"):
        save(tmp_path, name, 1)
    (tmp_path / "cat/.DS_Store").write_bytes(b"x")
    found = look(tmp_path)
    assert names(found) == ["cat/1.png"]
    assert found.skipped == ()
    assert found.without_images == ()


def test_only_below_the_root_a_dot_hides(tmp_path: Path) -> None:
    save(tmp_path, ".cache/photos/cat/1.png", 1)
    assert names(look(tmp_path / ".cache" / "photos")) == ["cat/1.png"]


def test_links_to_folders_and_files_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    save(tmp_path, "elsewhere/1.png", 1)
    save(tmp_path, "elsewhere/deep/2.png", 2)
    root = tmp_path / "photos"
    save(root, "dog/3.png", 3)
    (root / "cat").symlink_to(tmp_path / "elsewhere")
    (root / "dog" / "4.png").symlink_to(tmp_path / "elsewhere/1.png")
    (root / "dog" / "back").symlink_to(root)
    (tmp_path / "elsewhere" / "deep" / "loop").symlink_to(tmp_path / "elsewhere")
    (root / "self").symlink_to(root / "self")
    assert names(look(root)) == ["cat/1.png", "cat/deep/2.png", "dog/3.png", "dog/4.png"]


def test_names_of_images_that_are_none_are_damaged_with_the_reason(tmp_path: Path) -> None:
    save(tmp_path, "good.png", 1)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.webp").write_text("<html>not found</html>")
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.gif")
    found = look(tmp_path)
    assert names(found) == ["good.png"]
    assert {path.name: reason for path, reason in found.damaged.items()} == {
        "empty.jpg": "it is empty",
        "page.webp": "it begins like no image",
        "lost.png": "No such file or directory",
        "pipe.gif": "it is no regular file",
    }


def test_folders_without_an_image_in_or_below_them_are_told(tmp_path: Path) -> None:
    save(tmp_path, "a/b/1.png", 1)
    for folder in ("empty", "notes/deep", "a/c"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "notes/deep/x.txt").write_text("x")
    found = look(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found.without_images] == [
        "a/c",
        "empty",
        "notes",
        "notes/deep",
    ]
    assert by_ending(found.skipped_below(tmp_path / "notes")) == "1 .txt"
    assert found.skipped_below(tmp_path / "empty") == []


def test_a_switched_off_format_is_skipped_by_content(tmp_path: Path) -> None:
    save(tmp_path, "a.png", 1)
    save(tmp_path, "b.jpg", 2)
    (tmp_path / "c.jpg").write_bytes((tmp_path / "a.png").read_bytes())
    found = look(tmp_path, ("jpeg",))
    assert names(found) == ["b.jpg"]
    assert by_ending(found.skipped) == "1 .jpg, 1 .png"


def test_folders_are_named_up_to_four(tmp_path: Path) -> None:
    for number in range(6):
        save(tmp_path, f"{number}/x.png", number)
    assert look(tmp_path).seen() == "6 images in 6 folders (0, 1, 2, 3 and 2 more): 6 .png"


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "a.png", 1)
    for path in (tmp_path / "a.png", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=rf"data.images: there is no folder {path}"):
            look(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    save(tmp_path, "locked/a.png", 1)
    (tmp_path / "locked").chmod(0)
    try:
        with pytest.raises(ConfigError, match=r"data.images: cannot list .*locked: Permission denied"):
            look(tmp_path)
    finally:
        (tmp_path / "locked").chmod(0o700)
