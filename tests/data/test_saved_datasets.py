"""Data sets that the library `datasets` saved, for depth and semantic segmentation."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from uvim_fsq.data.saved_datasets import is_saved_dataset, open_rows, read_photo
from uvim_fsq.errors import UserError
from uvim_fsq.tasks.imagenet_color.task import ImagenetColor, ImagenetColorConfig
from uvim_fsq.tasks.nyu_depth.config import NYUDepthConfig
from uvim_fsq.tasks.nyu_depth.data import open_source as open_depth
from uvim_fsq.tasks.semantic_segmentation.config import SemanticSegmentationConfig
from uvim_fsq.tasks.semantic_segmentation.data import open_source as open_classes

DEPTH = NYUDepthConfig(protocol="full")
CLASSES = ((0, "road", ""), (1, "sky", "#ffffff"))


@pytest.fixture(scope="module")
def library() -> Any:
    # The clone's folder datasets/ can be imported too, as an empty package.
    library = pytest.importorskip("datasets")
    if not hasattr(library, "load_from_disk"):
        pytest.skip("the library `datasets` is not installed")
    return library


@pytest.fixture(scope="module")
def saved(library: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 training and 3 validation rows: photos, class maps and depth maps, as pictures and as arrays."""
    root = tmp_path_factory.mktemp("saved")
    picture = library.Image()
    features = library.Features(
        image=picture, label=picture, classes=library.Array2D((4, 6), "uint8"), depth_map=picture, real=picture,
        meters=library.Array2D((4, 6), "float32"),
    )  # fmt: skip

    def table(count: int) -> Any:
        ones = np.ones((4, 6))
        columns: dict[str, list[Any]] = {
            "image": [Image.new("RGB", (6, 4), (i, 0, 0)) for i in range(count)],
            "label": [Image.fromarray((ones * (i % 2)).astype(np.uint8)) for i in range(count)],
            "classes": [(ones * (i % 2)).astype(np.uint8) for i in range(count)],
            "depth_map": [Image.fromarray((ones * 1500).astype(np.uint16)) for _ in range(count)],
            "real": [Image.fromarray((ones * 1.5).astype(np.float32)) for _ in range(count)],
            "meters": [(ones * 1.5).astype(np.float32) for _ in range(count)],
        }
        return library.Dataset.from_dict(columns, features=features)

    library.DatasetDict({"train": table(20), "validation": table(3)}).save_to_disk(str(root / "both"))
    table(20).save_to_disk(str(root / "one"))
    return root


@pytest.mark.parametrize("column", ["depth_map", "real", "meters"])
def test_depth_may_be_a_picture_or_an_array(saved: Path, column: str) -> None:
    source = open_depth(str(saved / "both"), "val", NYUDepthConfig(protocol="full", depth_column=column))
    assert len(source) == 3 and source.info["layout"] == "datasets"
    sample = pickle.loads(pickle.dumps(source))[2]
    assert sample.id == "validation/00000002" and sample.image[0, 0].tolist() == [2, 0, 0]
    assert sample.maps["depth"].shape == (4, 6) and np.all(sample.maps["depth"] == 1.5)


@pytest.mark.parametrize("column", ["label", "classes"])
def test_class_maps_may_be_pictures_or_arrays(saved: Path, column: str) -> None:
    config = SemanticSegmentationConfig(classes=CLASSES, label_column=column)
    source = open_classes(str(saved / "both"), "train", config)
    assert len(source) == 20 and np.all(source[3].maps["classes"] == 1) and np.all(source[4].maps["classes"] == 0)


def test_photos_alone_are_data_for_colorization(saved: Path) -> None:
    task = ImagenetColor(ImagenetColorConfig())
    sample = pickle.loads(pickle.dumps(task.source(str(saved / "both"), "val")))[2]
    assert sample.id == "validation/00000002" and sample.image[0, 0].tolist() == [2, 0, 0] and not sample.maps
    assert task.metric(task.source(str(saved / "one"), "train")).protocol == "imagenet_color/psnr"
    task = ImagenetColor(ImagenetColorConfig(protocol="fid"))
    with pytest.raises(UserError, match="task.protocol=fid needs photos in files"):
        task.metric(task.source(str(saved / "both"), "val"))


@pytest.mark.parametrize(
    ("names", "val"),
    [
        (
            ["data/train-00000-of-00002", "data/train-00001-of-00002", "data/validation-00000-of-00001-0a"],
            "validation",
        ),
        (["train/0000", "train/0001", "val/0000"], "val"),
        (["train", "train-00001-of-00002", "test"], "test"),
    ],
)
def test_parquet_files_of_the_hub_are_read_as_they_are(
    library: Any, saved: Path, tmp_path: Path, names: list[str], val: str
) -> None:
    both = library.load_from_disk(str(saved / "both"))
    shards = [both["train"].shard(2, i, contiguous=True) for i in (0, 1)]
    for name, table in zip(names, [*shards, both["validation"]], strict=True):
        path = tmp_path / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        table.to_parquet(str(path))
    source = open_depth(str(tmp_path), "val", DEPTH)
    sample = pickle.loads(pickle.dumps(source))[2]
    assert len(source) == 3 and sample.id == f"{val}/00000002" and np.all(sample.maps["depth"] == 1.5)
    photos = open_rows(tmp_path, "train", ("image", "meters"))
    reds = [read_photo(photos[i]["image"], "photo")[0, 0, 0] for i in range(len(photos))]
    assert sorted(reds) == list(range(20)) and photos[0]["meters"].dtype == np.float32


def test_a_table_beside_photos_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name in ("metadata.parquet", "train/authors.parquet"):
        (tmp_path / name).write_bytes(b"PAR1")
    assert not is_saved_dataset(tmp_path)


def test_a_damaged_parquet_file_is_said(library: Any, tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(UserError, match="cannot be read as a saved data set"):
        open_depth(str(tmp_path), "val", DEPTH)


def test_arrays_are_not_turned_into_lists(saved: Path) -> None:
    """Which would take twenty times as long."""
    row = open_rows(saved / "both", "val", ("image", "meters"))[1]
    assert row["meters"].dtype == np.float32 and isinstance(row["image"], bytes)


def test_rows_that_cannot_be_read_are_named(library: Any, tmp_path: Path) -> None:
    columns = {
        "image": [{"bytes": b"no picture", "path": None}] * 2,
        "label": [[[0, 1], [1]]] * 2,
        "depth": [{"bytes": b"no picture", "path": None}] * 2,
    }
    numbers = library.Sequence(library.Sequence(library.Value("int64")))
    features = library.Features(image=library.Image(), label=numbers, depth=library.Image())
    library.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "data"))
    root = str(tmp_path / "data")
    row = "data, row/00000000: "
    with pytest.raises(UserError, match=f"{row}no class map"):
        open_classes(root, "val", SemanticSegmentationConfig(classes=CLASSES))[0]
    with pytest.raises(UserError, match=f"{row}no depth map"):
        open_depth(root, "val", NYUDepthConfig(depth_column="depth"))[0]
    with pytest.raises(UserError, match=f"{row}the image cannot be read as an image"):
        ImagenetColor(ImagenetColorConfig()).source(root, "val")[0]
    with pytest.raises(UserError, match="column 'image' is given twice"):
        open_depth(root, "val", NYUDepthConfig(depth_column="image"))


def test_without_an_evaluation_split_every_tenth_row_is_one(saved: Path) -> None:
    names = ("train", "val", "holdout", "train_minus_holdout")
    splits = {split: open_rows(saved / "one", split, ("image",)).rows for split in names}
    assert splits["val"] == [0, 10] and len(splits["train"]) == 18 and len(splits["holdout"]) == 1
    assert sorted(splits["holdout"] + splits["train_minus_holdout"]) == splits["train"]


def test_a_missing_split_is_named(library: Any, saved: Path, tmp_path: Path) -> None:
    both = library.load_from_disk(str(saved / "both"))
    for split, kept, wanted in (("train", "validation", "train"), ("val", "extra", "val")):
        library.DatasetDict({kept: both["validation"]}).save_to_disk(str(tmp_path / split))
        with pytest.raises(UserError, match=f"has the splits {kept}, but no {wanted}; rename one"):
            open_rows(tmp_path / split, split, ("image",))


def test_a_wrong_column_is_named(saved: Path) -> None:
    with pytest.raises(UserError, match="has no column 'depth', only image, label, classes"):
        open_depth(str(saved / "both"), "val", NYUDepthConfig(depth_column="depth"))
    with pytest.raises(UserError, match="the column of images holds no pictures"):
        open_depth(str(saved / "both"), "val", NYUDepthConfig(image_column="meters"))[0]


def test_paths_instead_of_pictures_are_not_followed(library: Any, tmp_path: Path) -> None:
    """A plain column of paths stays one; only the library's own pictures are embedded when they are saved."""
    Image.new("RGB", (6, 4)).save(tmp_path / "secret.png")
    value = library.Value
    features = library.Features(image={"bytes": value("binary"), "path": value("string")})
    row = {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}]}
    library.Dataset.from_dict(row, features=features).save_to_disk(str(tmp_path / "data"))
    with pytest.raises(UserError, match="column 'image' is empty or holds a path, not a picture"):
        open_rows(tmp_path / "data", "val", ("image",))[0]


def test_damaged_files_are_said(library: Any, tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as a saved data set"):
        open_depth(str(tmp_path), "val", DEPTH)


def test_a_missing_library_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install 'uvim-fsq.datasets.'"):
        open_depth(str(tmp_path), "val", DEPTH)
