"""`decoder_tuning.run`: the token model of a trained LM stays, and its decoder learns from predicted tokens."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.decoder_tuning import tuning_run, tuning_stage
from tests.support.ranks import run_ranks
from tests.support.runs import at, fit_run, last_weights, losses, save_untrained
from tests.support.small import TASKS, lm_run, oracle_run, random_batch
from uvim_fsq.checkpoints.loading import LoadedRun, load_checkpoint
from uvim_fsq.checkpoints.run_directory import checkpoints
from uvim_fsq.checkpoints.tuned import DECODING
from uvim_fsq.config.schema import DecoderTuningConfig
from uvim_fsq.data.sample import Batch
from uvim_fsq.errors import UserError
from uvim_fsq.evaluation.evaluator import Evaluator
from uvim_fsq.inference.code_decoding import build_generator
from uvim_fsq.inference.predictions import lm_predictions
from uvim_fsq.training import stages, step
from uvim_fsq.training.loop import fit
from uvim_fsq.training.stages import DecoderTuningStage, LMStage

CONTEXT = "model.decoder_context=encoder"
SOFT = "eval.codes=soft"
BASES = ("autoregressive", "masked", "trained decoder", "batch norm")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, random_runs: tuple[Path, Path]) -> dict[str, Path]:
    """LMs with random weights: both kinds, one with a trained decoder, one whose encoder has batch norms."""
    folder = tmp_path_factory.mktemp("bases")
    settings = {
        "masked": ["model.kind=masked"],
        "trained decoder": ["model.decoder=trained", CONTEXT, "loss.task_weight=1"],
        "batch norm": ["model.encoder={name: resnet10t, patch_size: null, width: null, depth: null, num_heads: null}"],
    }
    settings["batch norm"] += ["model.encoder.mlp_dim=null", "model.encoder.stages=[1]"]
    made = {kind: save_untrained(lm_run(folder / kind, random_runs[0], *keys)) for kind, keys in settings.items()}
    return {"autoregressive": random_runs[1], **made}


@pytest.fixture
def batch() -> Batch:
    labels, image = random_batch(TASKS["depth"], 6)
    return Batch(image=image, labels=labels, index=torch.arange(6), id=[str(i) for i in range(6)])


def predicted(lm: Path, batch: Batch, *settings: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens and distributions that evaluation predicts."""
    loaded = load_checkpoint(lm, settings)
    assert isinstance(loaded, LoadedRun) and loaded.lm is not None
    generated = build_generator(loaded.lm, loaded.run.eval)(batch["image"], torch.zeros(6, dtype=torch.int64))
    return generated.tokens, generated.probabilities


def kept_and_tuned(new: Path, lm: Path) -> tuple[bool, list[bool]]:
    """Whether the weights of the token model are those of the LM, and which of the decoder's are the oracle's."""
    ours, theirs = last_weights(new), last_weights(lm)
    oracle = load_checkpoint(lm).oracle.state_dict()
    names = {name for name in ours if not name.startswith("label_decoder.")}
    assert names == {name for name in theirs if not name.startswith("label_decoder.")}
    before = {f"label_decoder.{name}": value for name, value in oracle.items()} | theirs
    same = [torch.equal(ours[name], before[name]) for name in ours.keys() & before.keys() - names]
    return all(torch.equal(ours[name], theirs[name]) for name in names), same


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("base", BASES)
def test_only_the_decoder_learns(tmp_path: Path, bases: dict[str, Path], base: str, optimizer: str) -> None:
    decay = ["train.ema=0.5", "optim.weight_decay=0.1", "optim.warmup_steps=0", f"optim.name={optimizer}"]
    new = fit_run(tuning_run(tmp_path / "new", bases[base], CONTEXT, *decay))
    kept, same = kept_and_tuned(new, bases[base])
    assert kept
    assert len(same) > 10 and not any(same)


def test_gradients_reach_all_of_the_decoder_and_nothing_else(
    tmp_path: Path, bases: dict[str, Path], batch: Batch
) -> None:
    stage = tuning_stage(tuning_run(tmp_path, bases["autoregressive"], CONTEXT, SOFT))
    stage.step(stage.model, batch)[0].backward()
    gradients = {name: p.grad for name, p in stage.lm.named_parameters() if p.grad is not None}
    assert gradients.keys() == {name for name, _ in stage.lm.named_parameters() if name.startswith("label_decoder.")}
    assert gradients.keys() == {name for name, p in stage.lm.named_parameters() if p.requires_grad}
    assert float(gradients["label_decoder.feature_projection.weight"].abs().max()) > 0
    assert float(gradients["label_decoder.decoder_stem.weight"].abs().max()) > 0
    assert all(p.grad is None for p in stage.oracle.parameters())


def mixture(stage: DecoderTuningStage, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """True tokens, tokens of the mixture, and its distributions, with the model in training mode."""
    stage.model.train()
    true = stage.true_tokens(batch)
    mixed = stage.mixture(batch["image"], true)
    assert mixed.probabilities is not None
    return true, mixed.tokens, mixed.probabilities


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("codes", ["hard", "soft"])
def test_without_true_tokens_the_mixture_is_what_evaluation_predicts(
    tmp_path: Path, bases: dict[str, Path], batch: Batch, base: str, codes: str
) -> None:
    settings = ["decoder_tuning.true_share=0", f"eval.codes={codes}"]
    kept = [CONTEXT] if base == "trained decoder" else []
    stage = tuning_stage(tuning_run(tmp_path, bases[base], *settings, *kept))
    expected, distributions = predicted(bases[base], batch, f"eval.codes={codes}")
    for _ in range(2):
        true, tokens, probabilities = mixture(stage, batch)
        assert torch.equal(tokens, expected) and not torch.equal(tokens, true)
        if distributions is None:
            assert torch.equal(probabilities.argmax(-1), tokens) and set(probabilities.unique().tolist()) == {0, 1}
            assert torch.equal(probabilities.sum(-1), torch.ones(tokens.shape))
        else:
            assert torch.equal(probabilities, distributions) and float(probabilities.max()) < 1


@pytest.mark.parametrize("base", ["autoregressive", "masked"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_predictions_have_the_precision_of_evaluation(
    tmp_path: Path, bases: dict[str, Path], batch: Batch, base: str, precision: str
) -> None:
    """Not that of training, which the loop sets."""
    settings = ("decoder_tuning.true_share=0", SOFT, f"eval.precision={precision}")
    stage = tuning_stage(tuning_run(tmp_path, bases[base], CONTEXT, *settings))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "fp32"):
        mixed = stage.mixture(batch["image"], stage.true_tokens(batch))
        loss, _ = stage.step(stage.model, batch)
    loss.backward()
    expected = predicted(bases[base], batch, *settings[1:])[1]
    assert mixed.probabilities is not None and expected is not None and torch.equal(mixed.probabilities, expected)


def test_dropout_is_off(tmp_path: Path, random_runs: tuple[Path, Path], batch: Batch) -> None:
    keys = ["model.dropout=0.5", "model.encoder.drop_path=0.5"]
    lm = save_untrained(lm_run(tmp_path / "lm", random_runs[0], *keys))
    stage = tuning_stage(tuning_run(tmp_path / "new", lm, "decoder_tuning.true_share=0"))
    assert torch.equal(mixture(stage, batch)[1], predicted(lm, batch)[0])
    assert stage.lm.config.dropout == 0.5, "the run keeps its settings"


@pytest.mark.parametrize("codes", ["hard", "soft"])
def test_with_true_tokens_alone_the_first_loss_is_that_of_the_frozen_oracle(
    tmp_path: Path, bases: dict[str, Path], batch: Batch, codes: str
) -> None:
    settings = ["decoder_tuning.true_share=1", CONTEXT, f"eval.codes={codes}"]
    stage = tuning_stage(tuning_run(tmp_path, bases["autoregressive"], *settings))
    true, tokens, probabilities = mixture(stage, batch)
    assert torch.equal(tokens, true)
    assert torch.equal(probabilities, torch.nn.functional.one_hot(true, 25).float())
    oracle = stage.oracle
    codes_of_true = oracle.quantizer.indices_to_codes(true)
    expected, _ = oracle.label_loss(codes_of_true, batch["labels"], batch["image"], stage.task.loss, stage.image_loss)
    loss, logs = stage.step(stage.model, batch)
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(logs["task_loss"], expected.mean())


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_about_the_given_share_of_tokens_is_true(
    tmp_path: Path, bases: dict[str, Path], batch: Batch, share: float
) -> None:
    stage = tuning_stage(tuning_run(tmp_path, bases["autoregressive"], SOFT, f"decoder_tuning.true_share={share}"))
    torch.manual_seed(0)
    true, first, distributions = mixture(stage, batch)
    certain = distributions.amax(-1) == 1
    assert torch.equal(first[certain], true[certain])
    found = torch.stack([mixture(stage, batch)[2].amax(-1) == 1 for _ in range(40)]).float()
    assert float(found.mean()) == pytest.approx(share, abs=0.06)
    # Steps, images and positions are independent.
    assert all(float(found.std(dim).mean()) > 0.3 for dim in (0, 1, 2))


def test_sampled_tokens_differ_from_step_to_step(tmp_path: Path, bases: dict[str, Path], batch: Batch) -> None:
    settings = ["eval.temperature=1", "decoder_tuning.true_share=0"]
    stage = tuning_stage(tuning_run(tmp_path, bases["autoregressive"], *settings))
    assert not torch.equal(mixture(stage, batch)[1], mixture(stage, batch)[1])
    drawn: list[torch.Tensor] = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(mixture(stage, batch)[1])
    assert torch.equal(*drawn), "the seed of the step determines them"


def test_tuning_starts_from_a_decoder_that_was_trained_before(
    tmp_path: Path, bases: dict[str, Path], batch: Batch
) -> None:
    lm = bases["trained decoder"]
    stage = tuning_stage(tuning_run(tmp_path, lm, CONTEXT))
    before = load_checkpoint(lm).lm
    assert before is not None and before.label_decoder is not None and stage.lm.label_decoder is not None
    torch.testing.assert_close(stage.lm.label_decoder.state_dict(), before.label_decoder.state_dict(), rtol=0, atol=0)
    assert not torch.equal(stage.lm.label_decoder.decoder_stem.weight, stage.oracle.decoder_stem.weight)


def test_settings_tuned_for_the_lm_do_not_matter(tmp_path: Path, bases: dict[str, Path]) -> None:
    """Not even if they are damaged: training's predictions have the settings of the run."""
    lm = shutil.copytree(bases["autoregressive"], tmp_path / "lm")
    (checkpoints(lm)[-1] / DECODING).write_text("{")
    tuning_stage(tuning_run(tmp_path / "new", lm))


def test_a_step_counts_a_prediction_and_the_training_of_the_decoder(tmp_path: Path, bases: dict[str, Path]) -> None:
    stage = tuning_stage(tuning_run(tmp_path, bases["masked"]))
    both = LMStage(replace(stage.run, decoder_tuning=DecoderTuningConfig()))
    assert both.train_flops() - stage.train_flops() == pytest.approx(stage.lm.cost().train * 2 / 3)


@pytest.mark.slow
def test_a_resumed_tuning_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path, bases: dict[str, Path]) -> None:
    settings = [CONTEXT, "train.save_every=3", "train.accumulate=2", "eval.temperature=1"]
    whole = fit_run(tuning_run(tmp_path / "whole", bases["masked"], *settings))
    half = fit_run(tuning_run(tmp_path / "half", bases["masked"], *settings))
    shutil.rmtree(at(half, 6))
    run = tuning_run(half, bases["masked"], *settings)
    fit_run(replace(run, train=replace(run.train, resume="auto")))
    one, two = last_weights(whole), last_weights(half)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert losses(half) == losses(whole)


@pytest.mark.slow
def test_the_loss_falls(tmp_path: Path, bases: dict[str, Path], data: Path) -> None:
    settings = ["train.steps=40", "optim.lr=3e-3", "decoder_tuning.true_share=0", CONTEXT]
    found = losses(fit_run(tuning_run(tmp_path / "new", bases["autoregressive"], *settings)))
    assert sum(found[-5:]) < 0.9 * sum(found[:5])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[SOFT], ["eval.codes=hard"]])
def test_evaluation_uses_the_tuned_decoder(tmp_path: Path, bases: dict[str, Path], settings: list[str]) -> None:
    run = tuning_run(tmp_path / "new", bases["autoregressive"], "optim.lr=1e-2", "optim.warmup_steps=0", *settings)
    stage = tuning_stage(run)
    fit(stage, run)

    def figures(loaded: LoadedRun) -> dict[str, float]:
        assert loaded.lm is not None
        predict = lm_predictions(loaded.lm, loaded.oracle, loaded.task, run.eval)
        return Evaluator(loaded.task, run.data, run.eval, quantizer=loaded.oracle.quantizer).run(
            predict, torch.device("cpu")
        )

    new, old = load_checkpoint(tmp_path / "new"), load_checkpoint(bases["autoregressive"])
    found = figures(new)
    assert found == stage.evaluate(stage.model.eval(), None, torch.device("cpu"))
    assert found["rmse"] != figures(old)["rmse"]
    assert old.lm is not None and stage.lm.label_decoder is not None
    old.lm.label_decoder = stage.lm.label_decoder
    assert found == figures(old)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("base", ["autoregressive", "masked"])
def test_compiled_tuning_equals_eager_tuning(
    tmp_path: Path, bases: dict[str, Path], base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_graph(function):  # without the C++ compiler; a graph break is an error
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")

    for module in (step, stages):
        monkeypatch.setattr(module, "compiled", one_graph)
    eager = fit_run(tuning_run(tmp_path / "eager", bases[base], CONTEXT, SOFT))
    compiled = fit_run(tuning_run(tmp_path / "compiled", bases[base], CONTEXT, SOFT, "train.compile=true"))
    assert losses(compiled) == pytest.approx(losses(eager), abs=1e-5)
    assert kept_and_tuned(compiled, bases[base])[0]


def tune_on_a_rank(out: str, lm: str) -> None:
    """What a rank runs; each saves what it ends with."""
    torch.set_num_threads(1)
    run = tuning_run(Path(out), Path(lm), CONTEXT, SOFT, "train.accumulate=2", "decoder_tuning.true_share=0")
    stage = tuning_stage(run)
    fit(stage, run)
    rank = step.make_accelerator(run.train).process_index
    torch.save(stage.lm.state_dict(), f"{out}_{rank}.pt")


@pytest.mark.multi
@pytest.mark.slow
def test_two_ranks_tune_like_one(tmp_path: Path, bases: dict[str, Path]) -> None:
    lm = bases["masked"]
    run_ranks(2, "tests.training.test_decoder_tuning:tune_on_a_rank", str(tmp_path / "two"), str(lm))
    tune_on_a_rank(str(tmp_path / "one"), str(lm))
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("one_0", "two_0", "two_1"))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert torch.allclose(value, one[name], atol=2e-4, rtol=1e-3), name
    assert kept_and_tuned(tmp_path / "two", lm)[0]


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        ("autoregressive", ["model.depth=2"], r"has another token model; leave model.\* as it was"),
        ("autoregressive", ["model.dropout=0.1"], r"has another token model; leave model.\* as it was"),
        (
            "trained decoder",
            ["model.decoder_context=pixels"],
            "has a trained decoder with model.decoder_context=encoder, which cannot change; leave it as it was",
        ),
    ],
)
def test_another_model_is_refused(
    tmp_path: Path, bases: dict[str, Path], base: str, settings: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tuning_stage(tuning_run(tmp_path, bases[base], *settings))


def test_another_oracle_is_refused(tmp_path: Path, bases: dict[str, Path], data: Path) -> None:
    run = tuning_run(tmp_path / "new", bases["autoregressive"])
    other = save_untrained(oracle_run(tmp_path / "other", data, "model.decoder_depth=2"))
    with pytest.raises(UserError, match=f"was trained on another oracle than oracle={other}; leave oracle= out"):
        tuning_stage(replace(run, oracle=str(other)))


def test_an_oracles_run_has_no_token_model(
    tmp_path: Path, bases: dict[str, Path], random_runs: tuple[Path, Path]
) -> None:
    run = tuning_run(tmp_path, bases["autoregressive"], f"decoder_tuning.run={random_runs[0]}")
    with pytest.raises(UserError, match=r"decoder_tuning.run=.* is of stage oracle; give the run of an LM"):
        tuning_stage(run)
