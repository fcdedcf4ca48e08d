"""Exports: equal to PyTorch for any batch, complete or not there, and one line for each reason that one is not run."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.paths import ROOT
from tests.support.runs import save_untrained
from tests.support.small import TASKS, lm_run
from uvim_fsq import Predictor
from uvim_fsq.checkpoints.loading import LoadedRun, load_checkpoint, load_direct
from uvim_fsq.cli import main
from uvim_fsq.config.plugins import trusting
from uvim_fsq.config.schema import LMRun
from uvim_fsq.data.cache import cache_dir
from uvim_fsq.data.tiles import Tiling
from uvim_fsq.errors import UserError
from uvim_fsq.inference import exporting, exports
from uvim_fsq.inference.exporting import (
    check_images,
    differences,
    export_checkpoint,
    export_graph,
    map_graph,
    refuse_different,
)
from uvim_fsq.inference.exports import MANIFEST
from uvim_fsq.inference.one_graph import TOKENS, MapGraph
from uvim_fsq.inference.packages import OWN_PACKAGES
from uvim_fsq.tasks.base import Real, Task
from uvim_fsq.tasks.coco_panoptic.task import CocoPanoptic, CocoPanopticConfig

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, exporting.ONNX_LIBRARIES)), reason="the extra onnx is not installed"
)
#: A real photo beside random pixels.
PHOTO = ROOT / "docs" / "pictures" / "imagenet_color.jpg"
#: Decoding settings that need all of the graph: distributions, codes that are scaled, and the oracle without codes.
SETTINGS = ("eval.codes=soft", "eval.code_scale=0.7", "eval.context_weight=0.2")
#: Panoptic labels without void and with scores.
INSTANCES = CocoPanoptic(CocoPanopticConfig(max_instances=5, categories=((1, "cat", True),), annotations="instances"))
PICTURES = list(np.random.default_rng(0).integers(0, 255, (3, 20, 30, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def cache_of_exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    """The graph of `SETTINGS`, once it was exported, for another format."""
    return {}


@pytest.fixture(scope="module")
def torch_export(
    tmp_path_factory: pytest.TempPathFactory,
    random_runs: tuple[Path, Path],
    cache_of_exports: Path,
    program: dict[str, Any],
) -> Path:
    """An autoregressive model as a torch program; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("exports") / "torch"

    def export(graph: MapGraph, images: torch.Tensor) -> torch.export.ExportedProgram:
        program["exported"] = export_graph(graph, images)
        return program["exported"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UVIM_FSQ_CACHE", str(cache_of_exports))
        patch.setattr(exporting, "export_graph", export)
        export_checkpoint(load_checkpoint(random_runs[1], SETTINGS), "torch", folder)
    return folder


@pytest.fixture(scope="module")
def predictor(torch_export: Path) -> Predictor:
    return Predictor.from_export(torch_export, trust=True)


@pytest.fixture
def exported(torch_export: Path, cache_of_exports: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`torch_export` for the user who made it."""
    monkeypatch.setenv("UVIM_FSQ_CACHE", str(cache_of_exports))
    monkeypatch.delenv("UVIM_FSQ_TRUST", raising=False)
    return torch_export


@pytest.fixture
def copied(tmp_path: Path, exported: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports hold text instead of a program; they are run by PyTorch, see `pretend`."""

    def write(program: Any, kind: str, folder: Path, names: list[str]) -> None:
        (folder / exports.PROGRAMS[kind]).write_text("program")

    monkeypatch.setattr(exporting, "export_graph", lambda graph, images: None)
    monkeypatch.setattr(exporting, "_write", write)


@pytest.fixture
def pretend(written: None, monkeypatch: pytest.MonkeyPatch, random_lm: LoadedRun) -> None:
    """Exports of `random_lm` without exporting."""
    graph = map_graph(random_lm)
    monkeypatch.setattr(exporting, "open_program", lambda *_: graph)


@pytest.mark.slow
def test_a_torch_program_predicts_what_the_run_predicts(predictor: Predictor, random_runs: tuple[Path, Path]) -> None:
    run = Predictor.from_run(random_runs[1], SETTINGS)
    pictures = [*PICTURES, PHOTO]
    for item, expected in zip(predictor.predict_batch(pictures), run.predict_batch(pictures), strict=True):
        assert item.shape == expected.shape and item.dtype == np.float32
        np.testing.assert_allclose(item, expected, atol=1e-4)
    np.testing.assert_allclose(predictor.predict(PHOTO), expected, atol=1e-4)


@pytest.mark.slow
@needs_onnx
def test_an_onnx_model_predicts_what_the_run_predicts(
    tmp_path: Path, torch_export: Path, program: dict[str, Any], random_runs: tuple[Path, Path], monkeypatch: Any
) -> None:
    monkeypatch.setattr(exporting, "export_graph", lambda graph, images: program["exported"])
    manifest = export_checkpoint(load_checkpoint(random_runs[1], SETTINGS), "onnx", tmp_path / "export")
    assert manifest["measured"]["tokens"]["share"] == 0 and manifest["measured"]["depth"]["largest"] < 1e-4
    run, exported = Predictor.from_run(random_runs[1], SETTINGS), Predictor.from_export(tmp_path / "export")
    pictures = [*PICTURES, PHOTO]
    for batch in (pictures, pictures[:1]):
        for item, expected in zip(exported.predict_batch(batch), run.predict_batch(batch), strict=True):
            np.testing.assert_allclose(item, expected, atol=1e-4)
    file = tmp_path / "export" / "model.onnx"
    images, program32 = torch.from_numpy(np.stack([run.prepare(PICTURES[0])])), exports._onnx_program(file)
    exporting.quantize(file)
    assert [path.name for path in sorted(file.parent.iterdir())] == [MANIFEST, file.name]
    eight = exports._onnx_program(file)(images)["depth"]
    changed = (eight - program32(images)["depth"]).abs() > 1e-3  # in bins, at random weights
    assert 0 < float(changed.float().mean()) < 0.3


@pytest.mark.slow
def test_a_parallel_model_is_one_graph_for_any_batch(tmp_path: Path, random_runs: tuple[Path, Path]) -> None:
    run = save_untrained(lm_run(tmp_path / "masked", random_runs[0], "model.kind=masked"))
    graph = map_graph(load_checkpoint(run, ["eval.steps=2"]))
    images = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    with torch.no_grad():
        program = export_graph(graph, images[:2]).module()
        for batch in (1, 3):
            found, expected = program(images[:batch]), graph(images[:batch])
            assert list(found) == ["depth", TOKENS] and torch.equal(found[TOKENS], expected[TOKENS])
            torch.testing.assert_close(found["depth"], expected["depth"], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_an_export_is_used_like_a_run(predictor: Predictor, torch_export: Path, random_runs: tuple[Path, Path]) -> None:
    assert predictor.predict_tiles(np.zeros((200, 70, 3), np.uint8), Tiling(64)).shape == (200, 70)
    run = Predictor.from_run(random_runs[1], SETTINGS)
    assert "code_scale=" in run.provenance["decoding"]
    assert predictor.provenance == {"checkpoint": str(torch_export), "decoding": run.provenance["decoding"]}
    assert predictor.fingerprint != run.fingerprint
    with pytest.raises(UserError, match="an export draws no samples"):
        predictor.predict_samples(PICTURES[0], 2)
    with pytest.raises(UserError, match="the settings of an export are fixed"):
        predictor.with_overrides(["eval.codes=hard"])


@pytest.mark.slow
def test_a_torch_program_is_moved_whole(torch_export: Path) -> None:
    meta = torch.device("meta")  # another device that every machine has
    program: Any = exports._torch_program(torch_export / "model.pt2", meta)
    graphs = [module for module in program.modules() if isinstance(module, torch.fx.GraphModule)]
    named = [str(node.kwargs["device"]) for x in graphs for node in x.graph.nodes if "device" in node.kwargs]
    assert len(graphs) > 1 and named and set(named) == {"meta"}
    assert {x.device for x in program.state_dict().values()} == {meta}
    assert {x.device for x in program.buffers()} | {x.device for x in program.parameters()} == {meta}


@pytest.mark.slow
def test_the_manifest_says_what_a_user_needs_and_no_local_path(exported: Path, random_runs: tuple[Path, Path]) -> None:
    text = (exported / MANIFEST).read_text()
    manifest = json.loads(text)
    assert manifest["input"]["shape"] == ["batch", 3, 16, 16] and manifest["input"]["dtype"] == "uint8"
    assert manifest["outputs"]["depth"] == {
        "shape": ["batch", 16, 16],
        "dtype": "float32",
        "meaning": "meters, 0.001 to 10",
    }
    assert manifest["decoding"]["codes"] == "soft" and set(manifest["measured"]) == {"depth", "tokens"}
    assert str(random_runs[0].parent) not in text and str(ROOT).encode() not in (exported / "model.pt2").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), r"is no export \(it has no export.json\)"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "export.json is damaged"),
        (lambda folder: change(folder, format="keras"), "export.json is damaged"),
        (lambda folder: change(folder, files={"model.pt2": "0", "../x": "0"}), "export.json is damaged"),
        (lambda folder: change(folder, config={"stage": "oracle"}), "export.json: task.name is missing"),
        (lambda folder: change(folder, config={"extends": "/etc/passwd"}), "export.json contains `extends`"),
        (lambda folder: (folder / "model.pt2").unlink(), "model.pt2 cannot be read"),
        (lambda folder: (folder / "model.pt2").write_text("x"), "model.pt2 is damaged"),
    ],
)
def test_a_damaged_export_is_one_line(copied: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(copied)
    with pytest.raises(UserError, match=said) as caught:
        Predictor.from_export(copied, trust=True)
    assert "\n" not in str(caught.value)


def change(folder: Path, **values: Any) -> None:
    file = folder / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.slow
def test_a_torch_program_that_somebody_else_exported_needs_trust(
    exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded: list[Path] = []
    monkeypatch.setattr(exports, "_torch_program", lambda file, device: loaded.append(file))
    Predictor.from_export(exported)
    monkeypatch.setenv("UVIM_FSQ_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="was not exported by you; if you trust it, add --trust"):
        Predictor.from_export(exported)
    assert len(loaded) == 1
    Predictor.from_export(exported, trust=True)
    assert len(loaded) == 2


def test_an_unreadable_program_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    file.write_text("code")
    with pytest.raises(UserError, match="model.pt2 cannot be loaded") as caught, trusting():
        exports.open_program(tmp_path, "torch", {file.name: exports.file_hash(file)})
    assert "\n" not in str(caught.value)


def test_without_onnx_runtime_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    file = tmp_path / "model.onnx"
    file.write_text("model")
    with pytest.raises(UserError, match=r"which is not installed: pip install 'uvim-fsq\[onnx\]'"):
        exports.open_program(tmp_path, "onnx", {file.name: exports.file_hash(file)})
    monkeypatch.setattr(exporting, "ONNX_LIBRARIES", ("no_such_library",))
    with pytest.raises(UserError, match="--format onnx needs no_such_library: pip install"):
        exporting.require_libraries("onnx")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["eval.temperature=1"], "random decoding cannot be exported; set eval.temperature=0"),
        (["eval.precision=bf16"], "eval.precision=bf16: exports compute in float32"),
    ],
)
def test_settings_that_cannot_be_exported_are_one_line(
    tmp_path: Path, random_runs: tuple[Path, Path], settings: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        export_checkpoint(load_checkpoint(random_runs[1], settings), "torch", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_oracle_cannot_be_exported(tmp_path: Path, random_runs: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="is an oracle's checkpoint, which predicts no tokens; give the run of an LM"):
        export_checkpoint(load_checkpoint(random_runs[0]), "torch", tmp_path / "x")


def test_the_command_says_how_much_the_export_differs(
    pretend: None, own_cache: Path, random_runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(random_runs[1]), "--format", "torch", "--out", str(tmp_path / "x")])
    out = capsys.readouterr().out
    assert "depth: differs from PyTorch's by up to 0, 0.00% of the values" in out and f"written: {tmp_path}/x" in out
    assert (cache_dir() / OWN_PACKAGES).read_text().split() == [exports.file_hash(tmp_path / "x" / "model.pt2")]


def test_an_export_that_differs_from_pytorch_is_not_written(
    written: None, own_cache: Path, tmp_path: Path, random_lm: LoadedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = map_graph(random_lm)

    def wrong(image: torch.Tensor) -> dict[str, torch.Tensor]:
        found = graph(image)
        return {**found, "depth": found["depth"] * 1.1}

    monkeypatch.setattr(exporting, "open_program", lambda *_: wrong)
    with pytest.raises(UserError, match=r"of the export's depth differ from PyTorch's .* it was not written"):
        export_checkpoint(random_lm, "torch", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_rare_difference_is_measured_and_tolerated() -> None:
    right = {"classes": torch.zeros(1, 100, 100, dtype=torch.int64)}
    wrong = {"classes": right["classes"].clone()}
    wrong["classes"][0, 0, :5] = 7
    measured = differences(lambda image: wrong, torch.zeros(1), right)
    assert measured == {"classes": {"largest": 7, "share": pytest.approx(5e-4)}}
    refuse_different(measured)
    wrong["classes"][0, 1] = 7
    with pytest.raises(UserError, match="1.1% of the export's classes differ"):
        refuse_different(differences(lambda image: wrong, torch.zeros(1), right))


def test_the_pictures_that_are_compared_differ_from_each_other(random_lm: LoadedRun) -> None:
    images = check_images(random_lm).float()
    assert images.shape == (3, 3, 16, 16)
    assert all(float((images[i] - images[j]).abs().mean()) > 10 for i, j in ((0, 1), (1, 2), (0, 2)))


def test_the_direct_model_is_a_graph_of_label_maps_too(direct_dir: Path) -> None:
    loaded = load_direct(direct_dir)
    image, graph = check_images(loaded), map_graph(loaded)
    # A graph module could not hold weights under the name of one of its own attributes.
    assert not {name.partition(".")[0] for name in graph.state_dict()} & {*dir(torch.fx.GraphModule)}
    with torch.no_grad():
        maps = graph(image)
        (logits,) = loaded.model.iter_logits(image)
    assert list(maps) == ["depth"]
    np.testing.assert_array_equal(np.stack(loaded.task.from_maps(maps)), np.stack(loaded.task.decode(logits)))


class Maps(torch.nn.Module):
    """The label maps of a task as a graph of their own."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def forward(self, logits: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.task.to_maps(logits)


@pytest.mark.slow
@pytest.mark.parametrize("task", [*TASKS.values(), INSTANCES], ids=[*TASKS, "instances"])
def test_the_label_maps_of_a_task_can_be_part_of_a_graph_for_any_batch(task: Task) -> None:
    def logits(batch: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(batch)
        sizes = {name: x.channels if isinstance(x, Real) else x.num_classes for name, x in task.label_channels.items()}
        return {name: torch.randn(batch, 8, 8, size, generator=generator) for name, size in sizes.items()}

    batch = torch.export.Dim("batch", min=1)
    shapes = ({name: {0: batch} for name in task.label_channels},)
    program = torch.export.export(Maps(task), (logits(2),), dynamic_shapes=shapes).module()
    for number in (1, 3):
        found, expected = program(logits(number)), task.to_maps(logits(number))
        assert list(found) == list(expected) == list(task.describe_maps())
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_folder_of_something_else_is_refused_before_the_work(
    random_lm: LoadedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("")
    monkeypatch.setattr(exporting, "map_graph", lambda *_, **__: pytest.fail("has begun"))
    with pytest.raises(UserError, match=r"exists and holds no export.json, so it is not replaced"):
        export_checkpoint(random_lm, "torch", tmp_path)


def test_a_program_that_cannot_be_run_is_one_line(random_lm: LoadedRun) -> None:
    def program(image: torch.Tensor) -> dict[str, torch.Tensor]:
        raise LookupError("Got invalid dimensions\nfor input: image")

    assert isinstance(random_lm.run, LMRun)
    loaded = exports.LoadedExport(
        task=random_lm.task, checkpoint=Path("x"), run=random_lm.run, manifest={}, program=program
    )
    with pytest.raises(UserError, match=r"^x: its program does not take .* \(Got invalid dimensions\); lower eval"):
        loaded.decode(check_images(random_lm), torch.zeros(3))


def test_a_large_batch_is_run_in_parts(random_lm: LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvim_fsq.oracle.chunking.MAX_LOGITS", 16 * 16 * 16 * 2)  # S x S x bins of two images
    graph, sizes = map_graph(random_lm), []

    def program(image: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes.append(len(image))
        return graph(image)

    assert isinstance(random_lm.run, LMRun)
    loaded = exports.LoadedExport(
        task=random_lm.task, checkpoint=Path("x"), run=random_lm.run, manifest={}, program=program
    )
    with torch.no_grad():
        items, tokens = loaded.decode(check_images(random_lm), torch.zeros(3))
    assert sizes == [2, 1] and len(items) == 3 and tokens is not None and len(tokens) == 3
