"""Class files in the forms in which data sets come."""

from __future__ import annotations

from pathlib import Path

import pytest

from uvim_fsq.errors import UserError
from uvim_fsq.tasks.semantic_segmentation.classes import find_class_file, read_classes

ROAD, SKY = (0, "road", "#804080"), (1, "traffic light", "#4682b4")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "road 128 64 128\ntraffic light 70 130 180\n"),
        ("label_colors.txt", "128 64 128\troad\n70 130 180\ttraffic light\n"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nroad:128,64,128::\ntraffic light:70,130,180::\n"),
        ("class_dict.csv", "name,r,g,b\nroad, 128, 64, 128\ntraffic light,70,130,180\n"),
        ("classes.csv", "\ufeffid,name,red,green,blue\r\n0,road,128,64,128\r\n1,traffic light,70,130,180\r\n"),
        (
            "classes.json",
            '[{"name": "road", "color": [128, 64, 128]}, {"name": "traffic light", "color": [70, 130, 180], "id": 1}]',
        ),
    ],
)
def test_classes_are_read_with_their_colors(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_classes(find_class_file(tmp_path)) == (ROAD, SKY)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("objectInfo150.txt", "Idx\tRatio\tName\n1\t0.1\twall\n7\t0.2\tbuilding, edifice\n"),
        ("id2label.json", '{"1": "wall", "7": "building, edifice"}'),
        ("classes.txt", "1 wall\n7: building, edifice\n"),
        ("classes.txt", "1 wall 0 0 9\n7 building, edifice 0 9 0\n"),
    ],
)
def test_pixel_values_may_be_given(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    classes = read_classes(tmp_path / name)
    assert [(value, label) for value, label, _ in classes] == [(1, "wall"), (7, "building, edifice")]
    assert classes[0][2] != classes[1][2], "colors are filled in"


def test_names_may_begin_with_a_number(tmp_path: Path) -> None:
    for text, names in (("road\n2 wheeler\n", ["road", "2 wheeler"]), ("1 2 3 4x4\n3 4 5 6x6\n", ["4x4", "6x6"])):
        (tmp_path / "classes.txt").write_text(text)
        assert [(value, name) for value, name, _ in read_classes(tmp_path / "classes.txt")] == list(enumerate(names))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "names 0 classes; 2 to 1000 are needed"),
        ("a.txt", "one\n" * 2, "lists the name 'one' twice"),
        ("a.txt", "\n".join(map(str, range(1001))), "names 1001 classes"),
        ("a.txt", "one 1 2 300\ntwo 1 2 3", r"color \[1, 2, 300\]; each part is 0 to 255"),
        ("a.txt", "x" * 81 + "\ny", "is not a name of up to 80 characters"),
        ("a.csv", "id,name\n5,one\n5,two", "lists the pixel value 5 twice"),
        ("a.csv", "id,name\nx,one\n5,two", "'x' is not a whole number"),
        ("a.csv", "id,name\n-1,one\n5,two", "the pixel value -1; values are 0 to 65535"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.json", "3", "expected a list of names"),
        ("a.json", '["one", {"id": 1}]', "'None' is not the name of a class"),
        ("a.json", '["one", {"name": "two", "color": "red"}]', "expected .red, green, blue."),
        ("a.json", '["one", {"name": "t\\u0007wo"}]', "is not a name of up to 80 characters"),
    ],
)
def test_a_wrong_class_file_is_said_in_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_classes(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_missing_or_binary_class_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no file that names the classes"):
        find_class_file(tmp_path)
    with pytest.raises(UserError, match="task.class_file=mine.txt: .* is not a file"):
        find_class_file(tmp_path, "mine.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as text"):
        read_classes(tmp_path / "a.txt")
