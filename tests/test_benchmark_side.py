"""The benchmark's figures and what stands beside ours; the other packages are optional, and so are their tests."""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import small
from tests.support.paths import ROOT
from tests.support.small import generate
from uvim_fsq.benchmark import compare, hugging_face, metrics, side_by_side
from uvim_fsq.benchmark.setup import Sizes
from uvim_fsq.config.schema import EncoderConfig, LMModelConfig, LMRun, OracleRun
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.oracle.quantizers.fsq import FSQ
from uvim_fsq.performance.timing import Measurement, Timing
from uvim_fsq.synthetic.render import render
from uvim_fsq.tasks.configuration import load_run, resolve_lm

CPU = torch.device("cpu")
TINY = LMModelConfig(EncoderConfig("vit_tiny_patch16_224", "none", "gelu_tanh", 4, 16, 1, 2, 32), 16, 1, 2, 32)


def tiny_lm(config: LMModelConfig = TINY) -> AutoregressiveLM:
    torch.manual_seed(0)
    lm = AutoregressiveLM(config, image_size=16, vocab_size=25, length=4).eval()
    torch.nn.init.normal_(lm.head.weight)
    return lm


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Imports of these packages fail as where they are not installed."""
    for name in names:
        for loaded in [m for m in sys.modules if m.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, loaded)

    real = importlib.import_module

    def refuse(name: str, package: str | None = None) -> ModuleType:
        if name.split(".")[0] in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", refuse)


def by_name(lines: list[Measurement]) -> dict[str, Measurement]:
    names = [line.name for line in lines]
    assert len(set(names)) == len(names), names
    assert all(line.value > 0 and math.isfinite(line.value) for line in lines)
    return dict(zip(names, lines, strict=True))


def test_absent_packages_are_named_with_their_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, *compare.PACKAGES)
    module, said = compare.find_package("transformers")
    assert module is None and said == "not installed: pip install 'uvim-fsq[benchmark]'"
    module, said = compare.find_package("panopticapi", "evaluation")
    assert module is None
    assert said == "not installed: pip install git+https://github.com/cocodataset/panopticapi.git"


def test_a_broken_package_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vector_quantize_pytorch.py").write_text("import a_package_that_nobody_has")
    (tmp_path / "panopticapi.py").write_text("raise ImportError('made for another Python\\nmore')")
    (tmp_path / "transformers.py").write_text("five = 5")
    for name in compare.PACKAGES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    module, said = compare.find_package("vector_quantize_pytorch")
    assert module is None and said.startswith("cannot be imported (No module named 'a_package_that_nobody_has'): pip")
    module, said = compare.find_package("panopticapi")
    assert module is None and said.startswith("cannot be imported (made for another Python): pip install git+")
    assert compare.find_package("transformers")[0].five == 5
    for name in compare.PACKAGES:
        sys.modules.pop(name, None)


def test_comparison_tells_times_by_ours() -> None:
    timings = {"ours": Timing((2.0, 2.0)), "theirs": Timing((3.0, 5.0))}
    ours, theirs = compare.compare("work", timings, ours="ours", count=4, unit="images/s", version="1.2")
    assert (ours.name, ours.value, ours.unit, ours.other) == ("work, ours", 2.0, "images/s", {"version": "1.2"})
    assert (theirs.name, theirs.value, theirs.other) == ("work, theirs", 1.0, {"time / ours": 2.0})
    assert theirs.spread == 0.5
    ours, theirs = compare.compare("work", timings, ours="ours", count=4)
    assert (ours.value, theirs.value, theirs.unit, theirs.other["time / ours"]) == (500.0, 1000.0, "ms", 2.0)


def test_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "panopticapi")
    lines = by_name(metrics.measure_metrics(repeats=1, images=2, features=40, dim=8))
    assert list(lines) == [
        "PQ per image, ours",
        "PQ per image from PNGs, ours",
        "depth metrics per image",
        "FID moments of 2 x 40 x 8",
        "FID distance of 2 x 40 x 8, ours",
        "FID distance of 2 x 40 x 8, scipy's sqrtm",
    ]
    panoptic = lines["PQ per image, ours"].other
    assert panoptic["panopticapi"].startswith("not installed: pip install git+")
    assert 50 < panoptic["pq"] < 95 and panoptic["pq"] == lines["PQ per image from PNGs, ours"].other["pq"]
    assert lines["depth metrics per image"].other["abs_rel"] == pytest.approx(0.05, abs=0.002)
    fid = lines["FID distance of 2 x 40 x 8, ours"].other
    assert fid["fid"] > 0 and fid["relative difference"] < 1e-9
    theirs = lines["FID distance of 2 x 40 x 8, scipy's sqrtm"]
    ratio = theirs.value / lines["FID distance of 2 x 40 x 8, ours"].value
    assert theirs.other["time / ours"] == pytest.approx(ratio)


def test_sqrtm_distance_of_known_sets() -> None:
    features = metrics.synthetic_features(60, 5, 0)
    a, b = metrics.moments_of(features), metrics.moments_of(features + np.arange(5))
    # Equal covariances: the squared distance of the means is left.
    assert metrics.sqrtm_distance(a, b) == pytest.approx(30, rel=1e-9)
    assert a.count == 60 and np.allclose(a.covariance, np.cov(features.T))


def test_panoptic_case(tmp_path: Path) -> None:
    rooms = [render(0, index, metrics.SIZE).segments for index in range(2)]
    case = metrics.PanopticCase(rooms, tmp_path)
    assert case.ours(True) == case.ours(False)
    truth, prediction = case.pairs[1]
    assert len(truth.segment_ids) == len(np.unique(rooms[1])) - (0 in rooms[1])
    assert truth.segment_ids.max() > 1 << 16
    np.testing.assert_array_equal(case._read("1_truth.png"), truth.ids)
    np.testing.assert_array_equal(case._read("1_predicted.png"), prediction.ids)
    assert sum(info["area"] for info in case.annotations[1][0]["segments_info"]) == (truth.ids > 0).sum()
    case.pairs = [(truth, truth) for truth, _ in case.pairs]
    assert case.ours(False) == {"pq": 100.0, "sq": 100.0, "rq": 100.0}


def test_panopticapi_agrees(tmp_path: Path) -> None:
    pytest.importorskip("panopticapi")
    lines = by_name(metrics.measure_panoptic([render(0, index, metrics.SIZE).segments for index in range(3)], 1))
    for name in ("PQ per image", "PQ per image from PNGs"):
        assert lines[f"{name}, ours"].other["largest difference of pq, sq, rq"] < 1e-9
        assert lines[f"{name}, panopticapi"].other["time / ours"] > 0


def test_quantizer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "vector_quantize_pytorch")
    lines = by_name(side_by_side.compare_quantizers((7, 5), (2, 6), CPU, 1))
    assert list(lines) == ["quantizer forward, 2 x 6 x 2, ours", "quantizer forward and backward, 2 x 6 x 2, ours"]
    for line in lines.values():
        assert line.other["vector-quantize-pytorch"] == "not installed: pip install 'uvim-fsq[benchmark]'"


def test_quantizer_compared_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package in the same place, here our own FSQ."""
    other = SimpleNamespace(FSQ=lambda levels: FSQ(levels, shift="centered"))
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", other)
    lines = by_name(side_by_side.compare_quantizers((8, 5), (2, 6), CPU, 1))
    assert len(lines) == 4 and lines["quantizer forward, 2 x 6 x 2, ours"].other["fraction of equal indices"] == 1.0
    z = torch.randn(3, 4, 2)
    variants = side_by_side.quantizer_variants(FSQ((7, 5)), FSQ((7, 5)), z, backward=True)
    (ours,), (theirs,) = variants["ours"](), variants["vector-quantize-pytorch"]()
    # Straight through the rounding: the slope of tanh(z) * half_l / half_width.
    slope = (1 - torch.tanh(z) ** 2) * torch.tensor([6, 4]) * 0.999 / 2 / torch.tensor([3, 2])
    torch.testing.assert_close(ours, slope)
    torch.testing.assert_close(theirs, slope)


@pytest.mark.parametrize("levels", [(7, 5, 5, 5, 5), (8, 8), (8, 6, 5)])
def test_vector_quantize_pytorch_agrees(levels: tuple[int, ...]) -> None:
    """Indices count alike, and codes are equal wherever a value is not next to a rounding border."""
    module = pytest.importorskip("vector_quantize_pytorch")
    ours, theirs = FSQ(levels, shift="centered"), module.FSQ(list(levels))
    z = 2 * torch.randn(4, 500, len(levels), generator=torch.Generator().manual_seed(0))
    codes, indices = ours(z)
    other_codes, other_indices = theirs(z)
    bounded = ours.bound(z)
    clear = ((bounded - bounded.floor() - 0.5).abs() > 0.01).all(-1)
    assert clear.double().mean() > 0.8
    torch.testing.assert_close(codes[clear], other_codes[clear])
    torch.testing.assert_close(indices[clear], other_indices[clear].long())
    lines = by_name(side_by_side.compare_quantizers(levels, (4, 16), CPU, 1))
    assert lines[f"quantizer forward, 4 x 16 x {len(levels)}, ours"].other["fraction of equal indices"] > 0.9
    assert lines[f"quantizer forward, 4 x 16 x {len(levels)}, vector-quantize-pytorch"].other["time / ours"] > 0


def test_other_sizes_follow_the_model() -> None:
    """The other model's settings, read off a real one: a decoder narrower than its encoder included."""
    pytest.importorskip("transformers")
    lm = tiny_lm(replace(TINY, width=8, depth=2))
    model: Any = hugging_face.hugging_face_model(lm)
    encoder, decoder = model.config.encoder, model.config.decoder
    assert (encoder.hidden_size, encoder.num_hidden_layers, encoder.intermediate_size) == (16, 1, 32)
    assert (encoder.num_attention_heads, encoder.patch_size, encoder.image_size) == (2, 4, 16)
    assert encoder.hidden_act == decoder.activation_function == "gelu_pytorch_tanh"
    assert (decoder.d_model, decoder.decoder_layers, decoder.decoder_attention_heads) == (8, 2, 2)
    assert (decoder.decoder_ffn_dim, decoder.vocab_size, decoder.max_position_embeddings) == (32, 26, 4)
    assert model.enc_to_dec_proj.in_features == 16 and not model.training
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert all(decoder().shape == (2, 4) for decoder in side_by_side.alternative_decoders(lm, images, model).values())


def test_naive_loop_gives_the_cached_tokens() -> None:
    lm, images = tiny_lm(), torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    tokens = side_by_side.naive_generate(lm, images)
    assert len(tokens.unique()) > 3
    torch.testing.assert_close(tokens, generate(lm, images))


def test_decoding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "transformers")
    lines = by_name(side_by_side.compare_decoding(tiny_lm(), 1, batches=(2,)))
    assert list(lines) == ["decoding, batch 2, ours", "decoding, batch 2, naive loop"]
    assert lines["decoding, batch 2, ours"].other["transformers"].startswith("not installed")
    assert lines["decoding, batch 2, ours"].other["tokens equal to naive loop"] == 1.0
    assert lines["decoding, batch 2, naive loop"].unit == "images/s"


def small_sizes(*quantizer: str) -> Sizes:
    oracle = load_run(small.ORACLE, ["train.out=unused", *quantizer])
    run = load_run(small.LM, ["train.out=unused", "oracle=none"])
    assert isinstance(run, LMRun) and isinstance(oracle, OracleRun)
    return Sizes(oracle, resolve_lm(run, oracle))


def test_all_of_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, *compare.PACKAGES)
    monkeypatch.setattr(side_by_side, "LARGE_CALL", (8, 4))
    sizes = small_sizes()
    lines = by_name(side_by_side.measure_side_by_side(sizes, CPU, batches=(1, 32), repeats=1))
    assert [name for name in lines if "forward," in name] == [
        "quantizer forward, 32 x 4 x 2, ours",
        "quantizer forward, 8 x 4 x 2, ours",
    ]
    assert [name for name in lines if "naive" in name] == [f"decoding, batch {b}, naive loop" for b in (1, 32)]
    sizes = small_sizes("model.quantizer.kind=vq", "model.quantizer.codebook_size=9")
    lines = by_name(side_by_side.measure_side_by_side(sizes, CPU, batches=(1, 32), repeats=1))
    assert not [name for name in lines if "quantizer" in name] and len(lines) == 4


def test_hugging_face_decodes_all_tokens() -> None:
    pytest.importorskip("transformers")
    lm, images = tiny_lm(), torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    decoders = side_by_side.alternative_decoders(lm, images)
    assert list(decoders) == ["naive loop", "Hugging Face, dynamic cache", "Hugging Face, static cache"]
    tokens = {name: decoder() for name, decoder in decoders.items()}
    assert all(one.shape == (3, 4) and one.dtype == torch.int64 for one in tokens.values())
    # The emptied cache of the second call gives what a new one gives.
    torch.testing.assert_close(decoders["Hugging Face, static cache"](), tokens["Hugging Face, dynamic cache"])
    torch.testing.assert_close(tokens["Hugging Face, static cache"], tokens["Hugging Face, dynamic cache"])


def test_hugging_face_static_cache_sees_the_image() -> None:
    """Other images after the first call: the cross-attention's keys and values are computed anew."""
    pytest.importorskip("transformers")
    lm = tiny_lm()
    model: Any = hugging_face.hugging_face_model(lm)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    decoders = hugging_face.hugging_face_decoders(lm, images, model)
    first = decoders["Hugging Face, static cache"]()
    images.copy_(255 - images)
    second = decoders["Hugging Face, static cache"]()
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, decoders["Hugging Face, dynamic cache"]())


@pytest.mark.parametrize("file", ["quickstart_lm", "quickstart_gpu_lm", "lm"])
def test_hugging_face_is_of_equal_size(file: str) -> None:
    pytest.importorskip("transformers")
    run = load_run(ROOT / f"configs/nyu_depth/{file}.yaml", ["model.encoder.weights=none"])
    assert isinstance(run, LMRun)
    large = file == "lm"
    with torch.device("meta"):
        lm = AutoregressiveLM(
            run.model, image_size=512 if large else 32, vocab_size=4096 if large else 64, length=256 if large else 16
        )
    ours, theirs = (hugging_face.parameter_count(m) for m in (lm, hugging_face.hugging_face_model(lm)))
    assert theirs == pytest.approx(ours, rel=0.01)


def test_hugging_face_compared_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(side_by_side, "LARGE_CALL", (8, 4))
    sizes = small_sizes()
    lines = by_name(side_by_side.measure_side_by_side(sizes, CPU, batches=(1, 32), repeats=1))
    for batch in (1, 32):
        ours = lines[f"decoding, batch {batch}, ours"]
        theirs = lines[f"decoding, batch {batch}, Hugging Face, static cache"]
        assert theirs.other["time / ours"] == pytest.approx(ours.value / theirs.value)
        assert ours.other["Hugging Face parameters"] > 1000
