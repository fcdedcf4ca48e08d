"""Pages of data sets: every task's labels as the models see them, statistics, findings, hostile names."""

from __future__ import annotations

import html.parser
import os
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.support.camvid import PLUGIN, camvid_data
from tests.support.cli import failure
from tests.support.small import TASKS
from uvim_fsq.cli import main
from uvim_fsq.config.schema import DataConfig
from uvim_fsq.data.sample import Sample
from uvim_fsq.reports import data_page
from uvim_fsq.reports.data_page import UNLABELED, html_list, label_picture, write_data_page
from uvim_fsq.reports.data_statistics import Statistics, class_names, summary
from uvim_fsq.tasks.semantic_segmentation.task import SemanticSegmentation, SemanticSegmentationConfig

DEPTH, PANOPTIC, COLOR = TASKS["depth"], TASKS["panoptic"], TASKS["color"]


class Page(html.parser.HTMLParser):
    """The headings, words and links of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"
        if self.tags and self.tags[-1] in ("h2", "h3"):
            self.headings.append(data)


def test_labels_are_drawn_as_a_perfect_prediction() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    photo = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    assert np.abs(label_picture(COLOR, image, {"color": photo}).astype(int) - photo).max() <= 1
    bins = np.repeat(np.array([[0, 5, 10, 15]], np.uint8), 4, axis=0)
    picture = label_picture(DEPTH, image, {"depth": bins})
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 4
    depth: Any = DEPTH
    expected = DEPTH.render(image, depth.centers.numpy()[bins])["prediction"]
    assert np.array_equal(picture, expected)


def test_pixels_without_a_label_are_gray() -> None:
    labels = {name: np.full((4, 4), -1, np.int16) for name in PANOPTIC.label_channels}
    for values in labels.values():
        values[:, :2] = 1
    picture = label_picture(PANOPTIC, np.zeros((4, 4, 3), np.uint8), labels)
    assert (picture[:, 2:] == UNLABELED).all() and not (picture[:, :2] == UNLABELED).all(-1).any()


def test_statistics_count_values_classes_segments_and_missing_pixels() -> None:
    found, image = Statistics(), np.zeros((2, 4, 3), np.uint8)
    depth = np.array([[0, 1, 2, 3], [np.nan, 1, 1, 1]], np.float32)
    found.add(DEPTH, Sample("a", image, {"depth": depth}), {"depth": np.array([[0, 3], [3, -1]], np.int16)})
    found.add(DEPTH, Sample("b", image, {"other": np.array([[0, 7, 7, 9]] * 2)}), {"depth": np.full((2, 2), 3)})
    assert found.missing == {"depth": [0.25], "labels depth": [0.25, 0.0]}
    assert found.counts["depth"].tolist() == [1, 0, 0, 6, *[0] * 12] and found.segments == {"other": [2]}
    rows = {row[0]: row[1:] for row in summary(found)}
    assert rows["depth: value"] == ["1", "1", "3"] and rows["image width"] == ["4", "4", "4"]
    assert rows["labels depth: missing pixels per image"] == ["0.0%", "12.5%", "25.0%"]


def test_statistics_of_vectors_take_components_of_both_signs() -> None:
    found, image = Statistics(), np.zeros((2, 2, 3), np.uint8)
    vectors = np.array([[[-1, 0, 0], [0, 0, 1]], [[0, 0, 0], [np.nan, 0, 1]]], np.float32)
    found.add(COLOR, Sample("a", image, {"normals": vectors, "many": np.ones((2, 2, 9), np.float32)}), {})
    assert found.missing == {"normals": [0.5], "many": [0.0]}
    rows = {row[0]: row[1:] for row in summary(found)}
    assert rows["normals, component 1: value"] == ["-1", "-0.5", "0"] and "normals: value" not in rows
    assert rows["normals, component 3: value"] == ["0", "0.5", "1"] and rows["many: value"] == ["1", "1", "1"]


def test_statistics_count_class_0_and_not_missing_labels() -> None:
    task = SemanticSegmentation(SemanticSegmentationConfig(classes=tuple((i, f"class {i}", "") for i in range(3))))
    found, image = Statistics(), np.zeros((2, 2, 3), np.uint8)
    for values in ([[0, 0], [2, 2]], [[1, -1], [1, 1]]):
        classes = np.array(values, np.int32)
        found.add(task, Sample("a", image, {"classes": classes}), {"classes": classes})
    assert found.segments == {"classes": [2, 1]}


def test_classes_have_the_tasks_names_and_otherwise_numbers() -> None:
    assert class_names(PANOPTIC, "semantics") == ["void", "cat", "sky"]
    assert class_names(DEPTH, "depth") == [str(i) for i in range(16)]


@pytest.mark.slow
def test_a_page_is_self_contained_and_has_all_sections(coco_scenes: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    main(
        [
            "data",
            "view",
            str(coco_scenes),
            "--task",
            "coco_panoptic",
            "--num",
            "2",
            "--out",
            str(file),
            "data.image_size=32",
        ]
    )
    page = Page(file)
    sections = ["What is shown", "train: data", "train: samples", "train: statistics"]
    assert [heading for heading in page.headings if heading in sections] == sections
    assert {"frequency of the labels semantics", "segments: number per image"} <= set(page.headings)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources) and len(page.sources) >= 5
    assert "000000000001.jpg, 24 x 32 pixels" in page.headings and "script" not in page.tags
    assert file.read_text().count('width="192" height="144"') == 2 * 2, "image and ground truth keep their shape"


@pytest.mark.slow
def test_a_plugins_task_has_a_page(tmp_path: Path) -> None:
    photos, file = camvid_data(tmp_path / "photos"), tmp_path / "page.html"
    arguments = ["--task", "camvid_segmentation", f"plugins=[{PLUGIN}]", "data.image_size=16", "--split", "val"]
    main(["data", "view", str(photos), *arguments, "--out", str(file)])
    assert "val: samples" in Page(file).headings and "frequency of the labels classes" in Page(file).headings


@pytest.mark.slow
def test_findings_of_the_check_are_on_the_page(
    own_depth_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_depth_folder / "train" / "images" / "train3.jpg").write_bytes(b"no picture")
    (own_depth_folder / "val" / "depth" / "val0.npy").write_bytes(b"")
    file = tmp_path / "<b>&.html"
    arguments = ["--task", "nyu_depth", "task.protocol=full", "data.image_size=16", "--report", str(file)]
    with pytest.raises(SystemExit) as caught:
        main(["data", "check", str(own_depth_folder), *arguments])
    page = Page(file)
    assert caught.value.code == 2 and f"page: {file}" in capsys.readouterr().out
    assert {"train: findings", "val: findings", "train: samples", "val: statistics"} <= set(page.headings)
    assert "train3.jpg" in page.text and "val0.npy" in page.text
    assert "train: samples that cannot be read" in page.headings


def test_names_cannot_break_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "<script>alert(1)</script>\n$x_{$"
    # A name of a file that is not UTF-8.
    not_text = os.fsdecode(b"\xff.png")
    image = np.zeros((16, 16, 3), np.uint8)
    sample = Sample(evil, image, {"depth": np.ones((16, 16), np.float32), evil: np.ones((16, 16), np.int32)})

    class Source(list[Sample]):
        info: ClassVar[dict[str, Any]] = {"layout": evil, "split": "train", "count": 1}

    monkeypatch.setattr(type(DEPTH), "source", lambda self, root, split: Source([sample]))
    file = tmp_path / "page.html"
    findings = {"train": [evil, not_text]}
    write_data_page(file, DEPTH, DataConfig(root=evil, image_size=16), ("train",), findings=findings)
    page = Page(file)
    assert "script" not in page.tags and page.text.count("alert(1)") >= 4


def test_long_lists_of_findings_are_cut_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_page, "FINDINGS", 2)
    assert re.findall(r"<li>(.*?)</li>", html_list(["a", "b", "c"])) == ["a", "b"]
    assert html_list(["a", "b", "c"]).endswith("<p>and 1 more</p>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num 0", "show at least 1 and at most 200"),
        ("--num 100000", "show at least 1 and at most 200"),
        ("--split nothing", "nothing"),
        ("--out /dev/null/page.html", "cannot write"),
        ("task.nothing=1", "unknown key task.nothing"),
    ],
)
def test_mistakes_are_one_line(
    arguments: str, message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--out" in arguments else ["--out", tmp_path / "page.html"]
    assert message in failure(capsys, "data", "view", data, "--task", "nyu_depth", *out, *arguments.split())
    assert not list(tmp_path.glob("*.html"))


def test_a_missing_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in failure(capsys, "data", "view", tmp_path / "none", "--task", "nyu_depth")
