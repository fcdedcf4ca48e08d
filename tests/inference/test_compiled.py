"""Compiled packages: equal predictions, when they are used, and one line for each reason that they are not."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.support.compiler import needs_compiler
from tests.support.evaluation import batch_of
from uvim_fsq.checkpoints.loading import load_checkpoint
from uvim_fsq.checkpoints.run_directory import file_hash, resolve_checkpoint
from uvim_fsq.data.cache import cache_dir
from uvim_fsq.errors import UserError
from uvim_fsq.inference import ahead_of_time, compiled, one_graph, packages
from uvim_fsq.inference.ahead_of_time import compile_checkpoint, compile_graph
from uvim_fsq.inference.code_decoding import LMDecoder
from uvim_fsq.inference.compiled import CompiledPrediction, Decode, as_one_graph, chunk_sizes, prediction_graph
from uvim_fsq.inference.one_graph import LMGraph, PredictionGraph
from uvim_fsq.inference.packages import FOLDER, OWN_PACKAGES, find_packages
from uvim_fsq.inference.predictions import lm_predictions, predict_functions
from uvim_fsq.inference.predictor import Predictor
from uvim_fsq.lm.token_generator import TokenGenerator

CPU = torch.device("cpu")
PICTURES = list(np.random.default_rng(0).integers(0, 255, (5, 20, 30, 3), dtype=np.uint8))


class FakeRunner:
    """What a package would compute, computed by the graph itself."""

    def __init__(self, graph: PredictionGraph) -> None:
        self.graph = graph
        self.sizes: list[int] = []

    def boxed_run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        self.sizes.append(len(inputs[0]))
        return list(self.graph(*inputs))


@pytest.fixture
def compiled_run(
    tmp_path: Path, own_cache: Path, random_runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A copy of the LM of `random_runs` with packages for 1 and 4 images, which hold only text."""
    monkeypatch.delenv("UVIM_FSQ_TRUST", raising=False)
    run = tmp_path / "run"
    shutil.copytree(random_runs[1], run)

    def write(graph: PredictionGraph, image: torch.Tensor, file: Path) -> Path:
        file.write_text(f"code for {tuple(image.shape)}")
        return file

    monkeypatch.setattr(ahead_of_time, "compile_graph", write)
    compile_checkpoint(load_checkpoint(run), [1, 4], CPU, run)
    yield run


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch, random_lm: Any) -> FakeRunner:
    """Packages are run by their graph."""
    runner = FakeRunner(prediction_graph(random_lm))
    monkeypatch.setattr(compiled, "load_package", lambda file, device: runner)
    return runner


def unused(run: Path, *overrides: str) -> str:
    """The one line about a run's packages that are not used."""
    with pytest.warns(UserWarning) as caught:
        assert find_packages(load_checkpoint(run, overrides), CPU) is None
    (warning,) = caught
    text = str(warning.message)
    assert "\n" not in text and text.endswith("; predicting without the compiled package")
    return text


def manifest(run: Path) -> Path:
    (file,) = (resolve_checkpoint(run) / FOLDER).glob("*.json")
    return file


def test_packages_that_fit_are_used_for_the_batch_sizes_they_have(compiled_run: Path, runners: FakeRunner) -> None:
    predictor = Predictor.from_run(compiled_run)
    found = predictor.predict_batch(PICTURES)
    assert runners.sizes == [4, 1]
    for picture, item in zip(PICTURES, found, strict=True):
        np.testing.assert_allclose(item, predictor.predict(picture), atol=1e-4)


def test_a_padded_batch_gives_the_predictions_of_its_images(compiled_run: Path, runners: FakeRunner) -> None:
    found = Predictor.from_run(compiled_run).predict_batch(PICTURES[:3])
    assert runners.sizes == [4] and len(found) == 3
    shutil.rmtree(manifest(compiled_run).parent)
    np.testing.assert_allclose(found, Predictor.from_run(compiled_run).predict_batch(PICTURES[:3]), atol=1e-4)


def test_images_that_fit_no_package_are_predicted_without(compiled_run: Path, runners: FakeRunner) -> None:
    file = manifest(compiled_run)
    record = json.loads(file.read_text())
    del record["packages"]["1"]
    file.write_text(json.dumps(record))
    predictor = Predictor.from_run(compiled_run, ["eval.batch_size=5"])
    found = predictor.predict_batch(PICTURES)
    assert runners.sizes == [4]
    shutil.rmtree(file.parent)
    np.testing.assert_allclose(found, Predictor.from_run(compiled_run).predict_batch(PICTURES), atol=1e-4)


def test_images_left_over_keep_their_tokens(random_lm: Any, compiled_run: Path, runners: FakeRunner) -> None:
    decode: Any = as_one_graph(
        LMDecoder(random_lm.lm, random_lm.oracle, random_lm.task, random_lm.run.eval),
        load_checkpoint(compiled_run),
        CPU,
    )
    del decode.packages.files[1]
    images = torch.randint(0, 256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    with torch.inference_mode():
        items, tokens = decode(images, torch.arange(6))
        expected, expected_tokens = decode.plain(images, torch.arange(6))
    assert runners.sizes == [4] and torch.equal(tokens, expected_tokens)
    np.testing.assert_allclose(items, expected, atol=1e-4)
    decode.plain = lambda image, seeds: ([None] * len(image), None)  # as a direct model
    graph = runners.graph
    runners.graph = cast(Any, lambda *inputs: graph(*inputs)[:-1])
    with torch.inference_mode():
        items, tokens = decode(images, torch.arange(6))
    assert tokens is None and len(items) == 6


@pytest.mark.parametrize(("device", "index"), [("cpu", -1), ("cuda", -1), ("cuda:1", 1)])
def test_a_package_is_loaded_on_the_device_of_its_images(
    device: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "package_loader", lambda: lambda *given: given)
    # On a GPU without threads of its own, which could not be captured.
    loaded: Any = compiled.load_package(Path("a.pt2"), torch.device(device))
    assert loaded == ("a.pt2", "model", device != "cpu", 1, index)


def test_packages_are_not_used_for_images_of_another_size(compiled_run: Path, runners: FakeRunner) -> None:
    """They would read beyond the image, or only a part of it."""
    with pytest.raises(RuntimeError, match="size"):
        Predictor.from_run(compiled_run).predict_prepared([np.zeros((3, 8, 8), np.uint8)])
    assert not runners.sizes


def test_a_package_that_fails_is_one_line_and_nothing_is_lost(
    compiled_run: Path, runners: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        raise RuntimeError("run_func_ failed\nat line 1")

    predictor = Predictor.from_run(compiled_run)
    expected = predictor.predict_batch(PICTURES)
    run = runners.boxed_run
    monkeypatch.setattr(runners, "boxed_run", lambda inputs: run(inputs) if len(inputs[0]) == 4 else fail(inputs))
    with pytest.warns(UserWarning, match=r"failed \(run_func_ failed\); run .*without the compiled package") as caught:
        found = predictor.predict_batch(PICTURES)
    assert len(caught) == 1
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_evaluation_uses_packages(compiled_run: Path, runners: FakeRunner) -> None:
    loaded = load_checkpoint(compiled_run)
    assert loaded.lm is not None
    batch = batch_of(loaded, 4)
    with torch.inference_mode():
        found = predict_functions(loaded)["lm"](batch)
        assert runners.sizes == [4] and found.tokens is not None and found.bits is not None
        expected = lm_predictions(loaded.lm, loaded.oracle, loaded.task, loaded.run.eval)(batch)
    assert expected.tokens is not None and torch.equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.items, expected.items, atol=1e-4)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [1]),
        (2, [1, 1]),
        (10, []),
        (22, [32]),
        (21, []),
        (32, [32]),
        (33, [32, 1]),
        (64, [32, 32]),
        (90, [32] * 3),
        (100, [32] * 3),
    ],
)
def test_batches_are_divided_where_that_is_cheaper(count: int, expected: list[int]) -> None:
    assert chunk_sizes(count, [1, 32]) == expected


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("torch", "1.0", "compiled for torch 1.0"),
        ("uvim_fsq", "0.0", "compiled for uvim_fsq 0.0"),
        ("threads", 99, "compiled for threads 99"),
        ("checkpoint", {"model.safetensors": "0"}, "compiled for another checkpoint"),
        ("packages", {"1": {"file": "../x.pt2", "sha256": "0"}}, "is damaged"),
        ("packages", [], "is damaged"),
        ("device", "cpu", "a device with other instructions"),
    ],
)
def test_packages_that_do_not_fit_are_one_line(compiled_run: Path, key: str, value: Any, said: str) -> None:
    file = manifest(compiled_run)
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    text = unused(compiled_run)
    assert said in text and "run `uvim-fsq compile` again" in text


def test_a_package_for_instructions_that_this_cpu_lacks_is_not_used(compiled_run: Path) -> None:
    file = manifest(compiled_run)
    record = json.loads(file.read_text())
    record["device"]["instructions"] += ["avx999"]
    file.write_text(json.dumps(record))
    assert "a device with other instructions" in unused(compiled_run)


def test_packages_of_another_device_are_not_used(compiled_run: Path) -> None:
    file = manifest(compiled_run)
    file.rename(file.with_name("cuda-h100-torch-2.11.json"))
    assert "compiled for cuda-h100-torch-2.11" in unused(compiled_run)


def test_packages_for_other_decoding_settings_are_not_used(compiled_run: Path) -> None:
    assert "eval.codes=hard (now soft)" in unused(compiled_run, "eval.codes=soft")


def test_a_damaged_manifest_is_one_line(compiled_run: Path) -> None:
    manifest(compiled_run).write_text("{")
    assert "is damaged" in unused(compiled_run)


def test_packages_that_somebody_else_compiled_need_trust(compiled_run: Path, runners: FakeRunner) -> None:
    (cache_dir() / OWN_PACKAGES).unlink()
    assert "not compiled by you; if you trust them, add --trust" in unused(compiled_run)
    Predictor.from_run(compiled_run, trust=True).predict(PICTURES[0])
    assert runners.sizes == [1]


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"other code"), lambda file: file.unlink()])
def test_a_damaged_package_is_one_line_and_nothing_is_lost(
    compiled_run: Path, runners: FakeRunner, damage: Callable[[Path], None]
) -> None:
    for file in manifest(compiled_run).parent.glob("*.pt2"):
        damage(file)
    predictor = Predictor.from_run(compiled_run)
    with pytest.warns(UserWarning, match="predicting without the compiled package") as caught:
        found = predictor.predict_batch(PICTURES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        predictor.predict_batch(PICTURES)
    assert len(caught) == 1 and len(found) == 5 and not runners.sizes


def test_a_package_that_torch_cannot_load_is_one_line(compiled_run: Path) -> None:
    predictor = Predictor.from_run(compiled_run)
    with pytest.warns(UserWarning, match="cannot be loaded") as caught:
        assert predictor.predict(PICTURES[0]).shape == (20, 30)
    assert "\n" not in str(caught[0].message)


def test_compiling_again_replaces_the_packages(compiled_run: Path) -> None:
    loaded = load_checkpoint(compiled_run)
    compile_checkpoint(loaded, [2], CPU, compiled_run)
    (file,) = manifest(compiled_run).parent.glob("*.pt2")
    found = find_packages(loaded, CPU)
    assert found is not None and found.files == {2: (file, file_hash(file))}


def test_a_compilation_that_fails_leaves_the_earlier_packages(
    compiled_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Path:
        raise UserError("torch cannot compile this prediction")

    before = sorted(path.name for path in manifest(compiled_run).parent.iterdir())
    monkeypatch.setattr(ahead_of_time, "compile_graph", fail)
    with pytest.raises(UserError):
        compile_checkpoint(load_checkpoint(compiled_run), [8], CPU, compiled_run)
    assert sorted(path.name for path in manifest(compiled_run).parent.iterdir()) == before
    assert find_packages(load_checkpoint(compiled_run), CPU) is not None


def test_compiling_without_a_compiler_is_one_line(compiled_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler; install g\\+\\+, which only this command needs"):
        compile_checkpoint(load_checkpoint(compiled_run), [1], CPU, compiled_run)
    assert find_packages(load_checkpoint(compiled_run), CPU) is not None  # using them needs none


@pytest.mark.parametrize(("limit", "in_loop"), [(3, True), (4, False)])
def test_many_steps_are_compiled_as_a_loop(
    compiled_run: Path, monkeypatch: pytest.MonkeyPatch, limit: int, in_loop: bool
) -> None:
    made: list[PredictionGraph] = []

    def write(graph: PredictionGraph, image: torch.Tensor, file: Path) -> Path:
        made.append(graph)
        file.write_text("code")
        return file

    monkeypatch.setattr(ahead_of_time, "compile_graph", write)
    monkeypatch.setattr(one_graph, "MAX_UNROLLED", limit)
    compile_checkpoint(load_checkpoint(compiled_run), [1], CPU, compiled_run)  # 4 tokens, 1 block
    assert isinstance(made[0], LMGraph) and isinstance(made[0].generator, TokenGenerator)
    assert made[0].generator.in_loop is in_loop


def test_a_cache_folder_that_cannot_be_written_is_found_before_compiling(
    compiled_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> Path:
        raise AssertionError("it has compiled")

    monkeypatch.setattr(ahead_of_time, "compile_graph", never)
    monkeypatch.setenv("UVIM_FSQ_CACHE", "/dev/null/cache")
    with pytest.raises(UserError, match="cannot write /dev/null/cache"):
        compile_checkpoint(load_checkpoint(compiled_run), [1], CPU, compiled_run)


def test_packages_of_a_token_model_that_cannot_be_compiled_any_more_are_not_used(
    compiled_run: Path, random_lm: Any
) -> None:
    """The plugin that defines it may have changed."""
    decode = LMDecoder(random_lm.lm, random_lm.oracle, random_lm.task, random_lm.run.eval)
    decode.generator = cast(Any, lambda image, seeds: None)
    with pytest.warns(UserWarning, match="cannot be compiled whole.*predicting without the compiled package"):
        assert as_one_graph(decode, load_checkpoint(compiled_run), CPU) is decode


def test_an_oracle_cannot_be_compiled(random_runs: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="give the run of an LM"):
        compile_checkpoint(load_checkpoint(random_runs[0]), [1], CPU, random_runs[0])


def test_without_packages_nothing_is_said(random_lm: Any) -> None:
    plain: Any = object()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_one_graph(plain, random_lm, CPU) is plain


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("in_loop", "overrides"), [(False, []), (True, ["eval.codes=soft", "eval.temperature=1", "eval.samples=2"])]
)
def test_a_compiled_package_gives_the_predictions_of_the_plain_path(
    tmp_path: Path, random_runs: tuple[Path, Path], in_loop: bool, overrides: list[str]
) -> None:
    loaded = load_checkpoint(random_runs[1], overrides)
    graph = prediction_graph(loaded)
    assert isinstance(graph, LMGraph) and isinstance(graph.generator, TokenGenerator)
    image = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    graph.generator.in_loop = in_loop
    file = compile_graph(graph, image, tmp_path / "a.pt2")
    graph.generator.in_loop = False
    found = packages.Packages({2: (file, file_hash(file))}, "uint8")
    plain, unused = graph.decode, cast(Decode, None)
    decode = CompiledPrediction(unused, graph, found, loaded.task)
    seeds = torch.arange(2)
    with torch.inference_mode():
        (items, tokens), (expected, expected_tokens) = decode(image, seeds), plain(image, seeds)
    assert tokens is not None and expected_tokens is not None and torch.equal(tokens, expected_tokens)
    np.testing.assert_allclose(items, expected, atol=1e-4)
