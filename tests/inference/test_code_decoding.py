"""Soft and scaled codes, mixtures with context alone, and averages of samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.evaluation import shake
from tests.support.oracles import CONFIG
from tests.support.small import TASKS
from uvim_fsq.config.schema import EncoderConfig, EvalConfig, LMModelConfig, OracleModelConfig
from uvim_fsq.data.loader import derive_seed
from uvim_fsq.errors import UserError
from uvim_fsq.inference.code_decoding import LMDecoder, LogitMean, image_seeds, sample_seeds
from uvim_fsq.inference.predictions import context_predictions
from uvim_fsq.lm.autoregressive import AutoregressiveLM
from uvim_fsq.lm.base import Generated, TokenModel
from uvim_fsq.oracle import chunking
from uvim_fsq.oracle.model import Oracle
from uvim_fsq.tasks.base import Categorical, Real, Task
from uvim_fsq.tasks.nyu_depth.task import NYUDepth, NYUDepthConfig

IMAGES, SIDE = 5, 16
DEPTH = NYUDepth(NYUDepthConfig(num_bins=16, decoding="expectation"))


@dataclass
class World:
    """Models with random weights for a task, and images with their seeds."""

    task: Task
    oracle: Oracle
    lm: TokenModel
    image: torch.Tensor
    seeds: torch.Tensor

    def decoder(self, **settings: Any) -> LMDecoder:
        return LMDecoder(self.lm, self.oracle, self.task, EvalConfig(**settings))

    @torch.inference_mode()
    def predict(self, **settings: Any) -> list[Any]:
        return self.decoder(**settings)(self.image, self.seeds)[0]

    @torch.inference_mode()
    def tokens(self, **settings: Any) -> torch.Tensor:
        return self.decoder(**settings)(self.image, self.seeds)[1]

    @torch.inference_mode()
    def context(self) -> list[Any]:
        batch: Any = {"image": self.image}
        return context_predictions(self.oracle, self.task)(batch).items

    @torch.inference_mode()
    def logits(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.oracle.decode(codes, self.image)


def make_world(task: Task, config: OracleModelConfig = CONFIG) -> World:
    oracle = Oracle(config, task.label_channels, SIDE).eval()
    shake(oracle)
    encoder = EncoderConfig(name="vit_tiny_patch16_224", patch_size=4, width=16, depth=1, num_heads=2, mlp_dim=32)
    lm_config = LMModelConfig(encoder=encoder, width=16, depth=1, num_heads=2, mlp_dim=32)
    lm = AutoregressiveLM(lm_config, image_size=SIDE, vocab_size=25, length=4).eval()
    shake(lm)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (IMAGES, 3, SIDE, SIDE), generator=generator).to(torch.uint8)
    return World(task, oracle, lm, image, image_seeds(7, torch.arange(IMAGES)))


@pytest.fixture(params=["depth", "panoptic", "color"])
def world(request: pytest.FixtureRequest) -> World:
    return make_world(TASKS[request.param])


@pytest.fixture
def depth() -> World:
    """Depth as the mean over its bins, which changes with the smallest change of a probability."""
    return make_world(DEPTH)


def arrays(items: list[Any]) -> list[np.ndarray]:
    return [item if isinstance(item, np.ndarray) else np.append(item.ids, item.classes) for item in items]


def equal(one: list[Any], two: list[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(arrays(one), arrays(two), strict=True))


def close(one: list[Any], two: list[Any]) -> bool:
    return all(np.allclose(a, b, atol=1e-5) for a, b in zip(arrays(one), arrays(two), strict=True))


def test_the_default_decodes_the_tokens_codes_and_asks_for_no_probabilities(world: World) -> None:
    asked: list[bool] = []
    decoder = world.decoder()
    generator = decoder.generator

    def watched(image: torch.Tensor, seeds: torch.Tensor | None) -> Generated:
        found = generator(image, seeds)
        asked.append(found.probabilities is not None)
        return found

    decoder.generator = watched
    with torch.inference_mode():
        items, tokens = decoder(world.image, world.seeds)
        by_hand = world.task.decode(world.oracle.detokenize(tokens, world.image))
    assert asked == [False] and equal(items, by_hand)


def test_soft_codes_of_certain_tokens_are_their_codes(world: World) -> None:
    tokens = world.tokens()
    certain = torch.nn.functional.one_hot(tokens, 25).float()
    decoder = world.decoder(codes="soft")
    decoder.generator = lambda image, seeds: Generated(tokens, certain)
    with torch.inference_mode():
        items, _ = decoder(world.image, world.seeds)
    assert equal(items, world.predict())


def test_soft_codes_are_the_mean_codes_of_the_lms_own_distribution(depth: World) -> None:
    for settings in ({}, {"temperature": 0.5, "top_k": 3}):
        tokens = depth.tokens(**settings)
        with torch.inference_mode():
            chances = depth.lm.logits(depth.image, tokens).softmax(-1)  # pyright: ignore[reportCallIssue]
            codebook = depth.oracle.quantizer.codebook()
            by_hand = torch.einsum("blv,vd->bld", chances, codebook)
        found = depth.predict(codes="soft", **settings)
        assert close(found, depth.task.decode(depth.logits(by_hand)))
        assert not close(found, depth.predict(**settings))


def test_a_token_model_without_probabilities_has_no_soft_codes(depth: World) -> None:
    tokens, decoder = depth.tokens(), depth.decoder(codes="soft")
    decoder.generator = lambda image, seeds: Generated(tokens)
    with pytest.raises(UserError, match=r"the token model returned no probabilities.*; set eval.codes=hard"):
        decoder(depth.image, depth.seeds)


def test_scale_zero_is_context_alone(world: World) -> None:
    for codes in ("hard", "soft"):
        assert equal(world.predict(codes=codes, code_scale=0.0), world.context())


def test_the_scale_moves_codes_away_from_the_empty_code(depth: World, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.rand(IMAGES, 4, 2)
    monkeypatch.setattr(Oracle, "empty_codes", lambda self, count: empty[:count])
    codes = depth.oracle.quantizer.indices_to_codes(depth.tokens())
    for scale in (0.5, 1.5):
        by_hand = depth.task.decode(depth.logits((1 - scale) * empty + scale * codes))
        assert close(depth.predict(code_scale=scale), by_hand)
    assert equal(depth.predict(code_scale=1.0), depth.task.decode(depth.logits(codes)))
    assert equal(depth.predict(code_scale=0.0), depth.context())


def test_a_scale_moves_the_presence_of_codes_as_well() -> None:
    world = make_world(DEPTH, replace(CONFIG, dropped_code="learned"))
    assert equal(world.predict(code_scale=0.0), world.context())
    codes = world.oracle.mark_present(world.oracle.quantizer.indices_to_codes(world.tokens()))
    assert close(world.predict(code_scale=0.5), world.task.decode(world.logits(codes / 2)))


def test_weights_zero_and_one_are_the_codes_and_the_context(world: World) -> None:
    assert equal(world.predict(context_weight=0.0), world.predict())
    assert equal(world.predict(context_weight=1.0), world.context())
    assert not equal(world.predict(), world.context())


def test_weight_zero_decodes_nothing_twice(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    decode = Oracle.decode_hidden

    def counted(self: Oracle, codes: torch.Tensor, *inputs: Any) -> torch.Tensor:
        passes.append(len(codes))
        return decode(self, codes, *inputs)

    monkeypatch.setattr(Oracle, "decode_hidden", counted)
    world.predict()
    assert passes == [IMAGES]
    world.predict(context_weight=0.25)
    assert passes == [IMAGES] * 3


def test_a_categorical_mixture_is_one_of_probabilities(depth: World) -> None:
    codes = depth.logits(depth.oracle.quantizer.indices_to_codes(depth.tokens()))["depth"].softmax(-1)
    context = depth.logits(depth.oracle.empty_codes(IMAGES))["depth"].softmax(-1)
    mixed = (0.7 * codes + 0.3 * context).double().numpy()
    assert isinstance(depth.task, NYUDepth)
    by_hand = mixed @ depth.task.centers.double().numpy()
    found = np.stack(depth.predict(context_weight=0.3))
    assert np.abs(found - by_hand).max() < 1e-5
    assert np.abs(found - np.stack(depth.predict())).max() > 1e-2


def test_a_real_mixture_is_one_of_values() -> None:
    world = make_world(TASKS["color"])
    codes = world.logits(world.oracle.quantizer.indices_to_codes(world.tokens()))["color"].numpy()
    context = world.logits(world.oracle.empty_codes(IMAGES))["color"].numpy()
    found = np.stack(world.predict(context_weight=0.25))
    assert np.abs(found - np.clip(0.75 * codes + 0.25 * context, -1, 1)).max() < 1e-5


def test_mixed_classes_are_the_most_likely_of_the_mixture() -> None:
    world = make_world(TASKS["panoptic"])
    codes = world.logits(world.oracle.quantizer.indices_to_codes(world.tokens()))
    context = world.logits(world.oracle.empty_codes(IMAGES))
    mixed = {name: (0.5 * codes[name].softmax(-1) + 0.5 * context[name].softmax(-1)).log() for name in codes}
    assert equal(world.predict(context_weight=0.5), world.task.decode(mixed))


def test_samples_are_averaged_by_probability(depth: World) -> None:
    sampled = {"temperature": 2.0, "samples": 3, "codes": "soft", "code_scale": 0.8}
    parts: list[torch.Tensor] = []
    for number in range(3):
        one = replace(depth, seeds=sample_seeds(depth.seeds, number))
        parts.append(torch.from_numpy(np.stack(one.predict(**{**sampled, "samples": 1}))))
    # The mean over bins is linear in the probabilities.
    assert close(depth.predict(**sampled), list(torch.stack(parts).mean(0).numpy()))
    assert not torch.allclose(parts[0], parts[1])
    context = np.stack(depth.context())
    mixed = 0.6 * torch.stack(parts).mean(0).numpy() + 0.4 * context
    assert close(depth.predict(**sampled, context_weight=0.4), list(mixed))


def test_samples_do_not_depend_on_the_batch(world: World) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "samples": 3, "context_weight": 0.2}
    whole = world.predict(**settings)
    order = [3, 0]
    part = replace(world, image=world.image[order], seeds=world.seeds[order])
    assert close(part.predict(**settings), [whole[i] for i in order])


@pytest.mark.parametrize("together", [True, False])
def test_several_samples_of_an_image_are_those_of_a_batch_of_it(
    depth: World, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    decoder = depth.decoder(temperature=1.0, context_weight=0.2)
    if not together:  # a generator that encodes each copy of the image
        generator = decoder.generator
        monkeypatch.setattr(decoder, "generator", lambda image, seeds: generator(image, seeds))
    image, seeds = depth.image[1:2], torch.tensor([5, 3, 9])
    with torch.inference_mode():
        (items, tokens), (expected, same) = decoder.samples(image, seeds), decoder(image.repeat(3, 1, 1, 1), seeds)
    assert torch.equal(tokens, same) and len(tokens.unique(dim=0)) > 1
    assert close(items, expected) and not close(items[:1], items[1:2])


def test_the_first_sample_is_the_one_of_a_single_prediction(world: World) -> None:
    one, many = (world.tokens(temperature=1.0, samples=count) for count in (1, 4))
    assert torch.equal(one, many)


def test_an_image_has_the_same_seed_in_every_version() -> None:
    assert image_seeds(2, torch.tensor([0, 5])).tolist() == [2_000_006, 2_000_011]


def test_every_sample_has_a_seed_of_its_own() -> None:
    seeds = image_seeds(2**32 - 1, torch.arange(50))
    found = torch.stack([sample_seeds(seeds, number) for number in range(20)])
    assert torch.equal(found[0], seeds) and len(found.unique()) == found.numel()
    assert int(found[2, 3]) == derive_seed(int(seeds[3]), int(seeds[3]) >> 32, 2)


def test_few_logits_are_in_memory_at_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "samples": 2, "context_weight": 0.2}
    whole = world.predict(**settings)
    sizes: list[int] = []
    decode = Oracle.logits

    def measured(self: Oracle, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes.append(len(hidden))
        return decode(self, hidden)

    monkeypatch.setattr(Oracle, "logits", measured)
    monkeypatch.setattr(chunking, "MAX_LOGITS", 2 * world.oracle.num_patches * world.oracle.label_head.logits)
    assert close(world.predict(**settings), whole)
    assert sorted(sizes) == [1] * 3 + [2] * 6


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"int8_cross_kv": True}], ids=["bf16", "int8"])
def test_fast_decoding_has_probabilities_as_well(depth: World, settings: dict[str, Any]) -> None:
    full, fast = (np.stack(depth.predict(codes="soft", **keys)) for keys in ({}, settings))
    assert 0 < np.abs(full - fast).mean() < 0.1


def test_a_mean_of_improbable_classes_is_finite() -> None:
    mean = LogitMean({"classes": Categorical(2), "values": Real(1)})
    for _ in range(2):
        mean.add({"classes": torch.tensor([0.0, 500.0]), "values": torch.tensor([3.0])})
    found = mean.logits()
    torch.testing.assert_close(found["classes"], torch.tensor([-500.0, 0.0]))
    assert found["values"].item() == 3.0


@pytest.mark.parametrize("name", list(TASKS))
def test_every_task_decodes_log_probabilities_like_logits(name: str) -> None:
    task = TASKS[name]
    generator = torch.Generator().manual_seed(0)
    logits: dict[str, torch.Tensor] = {}
    for channel, kind in task.label_channels.items():
        size = kind.num_classes if isinstance(kind, Categorical) else kind.channels
        logits[channel] = torch.randn(2, SIDE, SIDE, size, generator=generator)
    mean = LogitMean(task.label_channels)
    mean.add(logits)
    assert close(task.decode(mean.logits()), task.decode(logits))
