"""An export where a run may stand: the same result files, settings that it does not fix, and devices."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.cli import failure
from tests.support.films import film
from tests.support.photos import noise_photo as photo
from uvim_fsq import Predictor
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.cli import main
from uvim_fsq.errors import UserError
from uvim_fsq.inference import exporting, exports
from uvim_fsq.inference.exporting import export_checkpoint, map_graph
from uvim_fsq.inference.predict_files import Options, predict_files
from uvim_fsq.tasks.nyu_depth.task import NYUDepth


@pytest.fixture
def export(tmp_path: Path, own_cache: Path, random_runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export of the LM with random weights. Its program is text in its folder, and computed by PyTorch."""
    loaded = load_checkpoint(random_runs[1])
    graph = map_graph(loaded)
    monkeypatch.setattr(exporting, "export_graph", lambda graph, images: None)
    monkeypatch.setattr(
        exporting, "_write", lambda program, kind, folder, names: (folder / "model.pt2").write_text("program")
    )
    for module in (exporting, exports):
        monkeypatch.setattr(module, "open_program", lambda *_: graph)
    export_checkpoint(loaded, "torch", tmp_path / "export")
    return tmp_path / "export"


def entries(out: Path) -> list[dict[str, str]]:
    return json.loads((out / "predictions.json").read_text())


def test_predict_takes_an_export_and_writes_what_it_writes_for_the_run(
    tmp_path: Path, export: Path, random_runs: tuple[Path, Path]
) -> None:
    pictures = [photo(tmp_path / "in" / f"{i}.png", i) for i in range(2)]
    clip = film(tmp_path / "in" / "clip.mp4", 2)
    for model, out in ((export, "a"), (random_runs[1], "b")):
        main(["predict", str(model), str(tmp_path / "in"), str(clip), "--write", "files", "--out", str(tmp_path / out)])
    found, expected = entries(tmp_path / "a"), entries(tmp_path / "b")
    assert [entry["image"] for entry in found] == [str(x) for x in pictures] + [f"{clip}#{i:06d}" for i in (1, 2)]
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() and one["checkpoint"] == str(export)
        assert one["settings"] != other["settings"]
        assert Path(one["png"]).name == Path(other["png"]).name
        np.testing.assert_array_equal(np.load(one["npy"]), np.load(other["npy"]))


def test_an_export_is_continued_like_a_run(tmp_path: Path, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = photo(tmp_path / "a.png")
    arguments = ["predict", str(export), str(picture), "--out", str(tmp_path / "out")]
    main(arguments)
    assert "1 picture predicted" in capsys.readouterr().out
    main([*arguments, "eval.batch_size=1"])
    assert "1 picture predicted" not in capsys.readouterr().out and len(entries(tmp_path / "out")) == 1


@pytest.mark.parametrize("setting", ["eval.codes=soft", "task.max_depth=5", "eval.nothing=1", "eval.tuned=false"])
def test_settings_that_an_export_fixes_are_one_line(
    tmp_path: Path, export: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    said = failure(capsys, "predict", export, photo(tmp_path / "a.png"), setting, "--out", tmp_path / "out")
    assert f"{setting}: the settings of an export are fixed, except eval.batch_size, data.max_pixels" in said
    assert "export the run with these settings, or give the run itself" in said and not (tmp_path / "out").exists()


def test_settings_that_an_export_does_not_fix_apply(tmp_path: Path, export: Path, default_pixel_limit: None) -> None:
    entries = predict_files(export, [str(photo(tmp_path / "a.png"))], tmp_path / "out", ["eval.batch_size=2"])
    assert entries[0]["overrides"] == "eval.batch_size=2"
    assert Predictor.from_export(export, ["eval.batch_size=2"]).run.eval.batch_size == 2
    with pytest.raises(UserError, match="eval.batch_size"):
        Predictor.from_export(export, ["eval.batch_size=0"])
    with pytest.raises(UserError, match="data.max_pixels"):
        Predictor.from_export(export, ["data.max_pixels=10"]).predict(tmp_path / "a.png")


def test_tiles_that_an_export_cannot_merge_are_refused_before_anything_is_predicted(
    tmp_path: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NYUDepth, "tiled", lambda self: NYUDepth(self.config))
    with pytest.raises(UserError, match="the label maps of tiles cannot be merged"):
        predict_files(export, [str(photo(tmp_path / "a.png"))], tmp_path / "out", options=Options(tiles=64))
    assert not (tmp_path / "out").exists()


def test_a_program_is_loaded_again_for_another_device(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[torch.device] = []
    monkeypatch.setattr(exports, "open_program", lambda folder, kind, files, device: devices.append(device))
    with pytest.raises(UserError, match="device='nowhere' cannot be used"):
        Predictor.from_export(export, device="nowhere")
    predictor = Predictor.from_export(export)
    monkeypatch.setattr("uvim_fsq.inference.predictor._device", torch.device)  # the true one refuses meta
    assert predictor.to("meta") is predictor and predictor.device.type == "meta"
    predictor.to("meta")
    Predictor.from_export(export, device="meta")
    assert [device.type for device in devices] == ["cpu", "meta", "meta"]


class Session:
    """ONNX Runtime's, as far as it is used."""

    made: list[Any]
    starts: bool

    def __init__(self, file: str, options: Any, providers: list[Any]) -> None:
        self.made.append(providers)
        self._providers = [x if isinstance(x, str) else x[0] for x in providers[0 if self.starts else -1 :]]

    def get_providers(self) -> list[str]:
        return self._providers

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="image")]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="depth")]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An ONNX Runtime that computes on GPUs."""
    found = SimpleNamespace(
        SessionOptions=SimpleNamespace,
        InferenceSession=Session,
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    monkeypatch.setattr(Session, "made", [], raising=False)
    monkeypatch.setattr(Session, "starts", True, raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", found)
    return found


def test_an_onnx_model_asks_for_the_provider_of_its_device(runtime: SimpleNamespace, tmp_path: Path) -> None:
    exports._onnx_program(tmp_path / "model.onnx", torch.device("cuda:1"))
    exports._onnx_program(tmp_path / "model.onnx")
    assert Session.made == [
        [("CUDAExecutionProvider", {"device_id": 1}), "CPUExecutionProvider"],
        ["CPUExecutionProvider"],
    ]


def test_a_device_that_onnx_runtime_does_not_have_is_one_line(runtime: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.onnx: this ONNX Runtime does not compute on mps \(it has CUDA"):
        exports._onnx_program(tmp_path / "model.onnx", torch.device("mps"))
    runtime.get_available_providers = lambda: ["CPUExecutionProvider"]
    with pytest.raises(UserError, match=r"does not compute on cuda \(it has CPUExecutionProvider\); install"):
        exports._onnx_program(tmp_path / "model.onnx", torch.device("cuda"))


def test_a_provider_that_cannot_start_is_not_replaced_silently(
    runtime: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "starts", False)
    with pytest.raises(UserError, match="CUDAExecutionProvider cannot start here"):
        exports._onnx_program(tmp_path / "model.onnx", torch.device("cuda"))
