"""The configuration schema: frozen dataclasses. The string under a field documents it and is shown by --help.

OmegaConf merges YAML files and `key=value` overrides; `config.parse` converts the result into these dataclasses. Stage
II (`LMRun`) repeats nothing of stage I: task, levels and architecture are read from the oracle's checkpoint. The direct
baseline (`DirectRun`) has no tokens and stands alone.

"The reference" below is the UViM reference code (big_vision, JAX). Does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

#: Level presets of the FSQ paper (arXiv 2309.15505, section 4), by approximate codebook size.
LEVEL_PRESETS: dict[str, tuple[int, ...]] = {
    "2^8": (8, 6, 5),
    "2^10": (8, 5, 5, 5),
    "2^12": (7, 5, 5, 5, 5),
    "2^14": (8, 8, 8, 6, 5),
    "2^16": (8, 8, 8, 5, 5, 5),
}

#: Built-in quantizers and token models; plugins may register others.
BUILT_IN_QUANTIZERS = ("fsq", "vq")
BUILT_IN_TOKEN_MODELS = ("autoregressive", "masked")


@dataclass(frozen=True)
class DataConfig:
    """The keys under `data:`: the data set and how samples are prepared."""

    root: str = ""
    """Data set folder; relative paths are looked up in $UVIM_FSQ_DATA (default: datasets/), then in the current one."""
    image_size: int = 512
    """Side in pixels of the square images and label maps that the models see."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str = "val"
    """Split to evaluate on."""
    selection_split: str = ""
    """Split that training evaluates on; empty: eval_split. A split other than eval_split selects the best checkpoint,
    by the task's main metric if the protocol reports it; otherwise the last checkpoint is the run's result."""
    crop: Literal["inception", "none"] = "inception"
    """Training crop: inception (random area and aspect ratio) or none (resize the whole image)."""
    crop_area: tuple[float, float] = (0.05, 1.0)
    """Smallest and largest fraction of the image area that the inception crop keeps."""
    hflip: bool = True
    """Flip training samples horizontally with probability 0.5."""
    color_jitter: tuple[float, float, float, float] | None = None
    """[brightness, contrast, saturation, hue]: vary the colors of training photos at random, e.g. [0.4, 0.4, 0.4, 0.1]:
    a value v multiplies the first three by 1 - v to 1 + v, and turns the hue by up to v of a circle (at most 0.5);
    null: not at all."""
    workers: int = 4
    """Loader processes per training process; 0 loads in the training process."""
    cache: bool = False
    """Keep decoded samples in memory (small data sets; with workers > 0 each worker keeps its own)."""
    cache_dir: str = ""
    """Folder in which training keeps decoded images and label maps, 1 to 2 MB per sample of 480 x 640, so that only the
    first epoch decodes the files; samples are the same; empty: none."""
    max_pixels: int = 250_000_000
    """Largest image or label map to decode, in pixels; larger ones are refused once the header is read."""
    max_bad_samples: int = 0
    """Unreadable training samples to skip and count before giving up; evaluation never skips."""


@dataclass(frozen=True)
class QuantizerConfig:
    """The keys under `model.quantizer:`; each quantizer uses those that concern it."""

    kind: str = "fsq"
    """Quantizer of the bottleneck: fsq, vq (the baseline that FSQ replaces), or one registered by a plugin."""
    levels: tuple[int, ...] | Literal["2^8", "2^10", "2^12", "2^14", "2^16"] = (7, 5, 5, 5, 5)
    """FSQ levels per channel, or a preset: 2^8, 2^10, 2^12, 2^14, 2^16."""
    shift: Literal["published", "centered"] = "published"
    """FSQ: offset inside the tanh for even levels: published (tan) or centered (atanh, so that bound(0) = 0)."""
    codebook_size: int = 4096
    """VQ: number of codewords (for FSQ, the product of the levels)."""
    codeword_dim: int = 768
    """VQ: channels of a codeword (for FSQ, the number of levels)."""
    momentum: float = 0.995
    """VQ: momentum of the running counts and sums that define the codewords."""
    split: bool = True
    """VQ: codebook splitting: rare codewords are replaced by halves of the most frequent ones."""
    commitment: float = 0.0
    """VQ: weight of the commitment loss, the mean squared distance between encoder output and codeword."""


@dataclass(frozen=True)
class OracleModelConfig:
    """The keys under `model:` in stage I: the oracle's architecture."""

    patch_size: int = 16
    """Side of a patch in pixels."""
    width: int = 768
    """Width of the transformer."""
    encoder_depth: int = 6
    """Blocks of the encoder."""
    decoder_depth: int = 12
    """Blocks of the decoder."""
    num_heads: int = 12
    """Attention heads."""
    mlp_dim: int = 3072
    """Hidden width of the MLP."""
    context: Literal["both", "encoder", "decoder", "none"] = "both"
    """Which halves of the oracle see the RGB image."""
    code_length: int = 256
    """Number of tokens per image, a square number."""
    code_dropout: Literal["none", "random", "ordered"] = "random"
    """Zero a random number of codes in training: at random positions (random) or always the last ones (ordered)."""
    dropped_code: Literal["zero", "learned"] = "zero"
    """What the decoder sees for a dropped code: zeros, as in the papers, which may also be a code of the codebook; or
    learned, a vector of its own, by a channel that is 1 for present codes and 0 for dropped ones."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)


@dataclass(frozen=True)
class EncoderConfig:
    """The keys under `model.encoder:` of an LM or a direct model: the image encoder."""

    name: str = "vit_large_patch16_224"
    """Name of a timm model: a ViT (also DINOv2, DINOv3, SigLIP 2), or a hierarchical or convolutional network."""
    weights: str = "none"
    """none, hub (download timm's published weights), package (tf_efficientnet_lite0, from the extra `pretrained`), or
    the path of a local .safetensors / .npz / .pth file."""
    act_layer: Literal["default", "gelu", "gelu_tanh"] = "default"
    """Activation of the MLPs; the reference uses gelu_tanh."""
    patch_size: int | None = None
    """Overrides the patch size of the named model."""
    width: int | None = None
    """Overrides the width of the named model."""
    depth: int | None = None
    """Overrides the depth of the named model."""
    num_heads: int | None = None
    """Overrides the attention heads of the named model."""
    mlp_dim: int | None = None
    """Overrides the MLP width of the named model."""
    image_size: int | None = None
    """Side in pixels of the encoder's own input, to which images are resized; null: data.image_size."""
    stages: tuple[int, ...] | None = None
    """Which of the model's stages (blocks of a ViT) give the features, from 0 or, negative, from the end. Several are
    resized to the grid of the first one listed, concatenated and projected; null: the last one."""
    out_width: int | None = None
    """Width of the features, by a linear projection; null: the model's own (several stages: that of the widest)."""
    frozen: bool = False
    """Keep the published weights as they are: no gradient, no stochastic depth."""
    drop_path: float = 0.0
    """Stochastic depth: rate at which the last block's residual branches are skipped in training, rising from 0 at the
    first block."""


@dataclass(frozen=True)
class LMModelConfig:
    """The keys under `model:` in stage II: the token model; each kind uses those that concern it."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    width: int = 1024
    """Width of the token decoder."""
    depth: int = 24
    """Blocks of the token decoder."""
    num_heads: int = 16
    """Attention heads of the token decoder."""
    mlp_dim: int = 4096
    """Hidden width of the token decoder's MLP."""
    dropout: float = 0.0
    """Dropout rate on the decoder's residual branches and token embeddings in training."""
    decoder: Literal["frozen", "trained"] = "frozen"
    """What turns codes into labels: the oracle's decoder, frozen; or a copy of it that is trained with the token model
    on soft codes (needs loss.task_weight)."""
    decoder_context: Literal["pixels", "encoder"] = "pixels"
    """What a trained decoder sees of the image: pixels, like the oracle's; or the image encoder's features as well."""
    kind: str = "autoregressive"
    """Token model: autoregressive (the papers' encoder-decoder), masked (predicts tokens in parallel, MaskGIT), or one
    registered by a plugin."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread evenly over all tokens in training."""
    mask_floor: float = 0.45
    """Masked: smallest share of tokens that is masked in training; shares follow a cosine between it and 1."""
    all_masked: float = 0.5
    """Masked: probability that all tokens of an example are masked in training, as in the first step of decoding."""


@dataclass(frozen=True)
class DirectModelConfig:
    """The keys under `model:` of the direct baseline: an image encoder, transformer blocks and a label head."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    patch_size: int = 16
    """Side in pixels of the label patch that the head predicts at each position; it must divide data.image_size. The
    encoder's features are resized to this grid."""
    width: int = 1024
    """Width of the blocks between image encoder and label head."""
    depth: int = 2
    """Number of these blocks."""
    num_heads: int = 16
    """Their attention heads."""
    mlp_dim: int = 4096
    """Hidden width of their MLP."""


@dataclass(frozen=True)
class LossConfig:
    """The keys under `loss:` in stage II."""

    task_weight: float = 0.0
    """Weight of the task's loss of the labels that the frozen oracle decodes from soft codes, the expected codes under
    the predicted distributions (All in Tokens, arXiv 2301.02229); 0: only the loss on tokens, as in the papers."""


@dataclass(frozen=True)
class DecoderTuningConfig:
    """The keys under `decoder_tuning:`, which `uvim-fsq tune-decoder` sets: stage II, with a token model that stays."""

    run: str = ""
    """Checkpoint of an LM. Its token model is kept, and only its copy of the oracle's decoder is trained; empty: the
    token model is trained."""
    true_share: float = 0.25
    """Share of tokens that are the true ones in this training; the LM predicts the others."""


@dataclass(frozen=True)
class OptimConfig:
    """The keys under `optim:`: optimizer and learning rate."""

    name: Literal["adafactor", "adamw"] = "adafactor"
    """adafactor (as in the reference) or adamw (torch's)."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 1e-5
    """Decoupled weight decay of weight matrices, scaled by the schedule (adafactor) or the learning rate (adamw)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Momentum and second-moment decay (adafactor: its upper bound)."""
    warmup_steps: int = 4000
    """Steps of linear warm-up from 0 before the cosine decay; must be below the run's number of steps."""
    final_lr_ratio: float = 0.0
    """Final learning rate as a fraction of the peak."""
    clip_norm: float | None = 1.0
    """Clip the global gradient norm to this value; null: no clipping."""
    encoder_lr_ratio: float = 1.0
    """Learning rate multiplier of the image encoder of an LM (reference: 0.1) or direct model; no effect in stage I."""
    encoder_layer_decay: float = 1.0
    """Further multiplier for each layer of the image encoder below its last one (layer-wise decay; e.g. 0.8)."""
    layer_decay: float = 1.0
    """The same for the blocks of the oracle (encoder and decoder counted through), of the token model's decoder or of
    the direct model, e.g. 0.8 with init_from. Label and token embeddings and heads keep the full rate."""


@dataclass(frozen=True)
class TrainConfig:
    """The keys under `train:`: length, batch, precision, logging and checkpoints."""

    out: str = ""
    """Run directory."""
    batch_size: int = 1024
    """Global batch size, over all processes and accumulation steps."""
    epochs: float | None = None
    """Length of training in epochs; set this or steps."""
    steps: int | None = None
    """Length of training in optimizer steps."""
    seed: int = 0
    """Seed of initialization, data order, augmentation and dropout."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of the forward and backward pass; master weights stay float32."""
    accumulate: int = 1
    """Micro-batches per optimizer step and process; their sizes may differ by one."""
    compile: bool = False
    """Use torch.compile for the model and, in stage II, for the oracle that computes the target tokens."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, which is evaluated and saved; null: none."""
    log_every: int = 50
    """Steps between log lines."""
    eval_every: int | None = None
    """Steps between evaluations; null: only at the end."""
    eval_limit: int | None = None
    """Images per evaluation in training; null: the whole split. The run's result always covers all of eval_split."""
    save_every: int | None = None
    """Steps between checkpoints; null: only at the end and on interruption."""
    keep: int = 2
    """Number of latest checkpoints to keep, in addition to the best one if one is selected (data.selection_split)."""
    resume: Literal["no", "auto"] | str = "no"
    """no (refuse a run directory that has checkpoints), auto (continue from the latest, if any) or the path of a
    checkpoint; newer checkpoints of that run are then moved to its folder set_aside/."""
    resume_changes: bool = False
    """Allow resuming with settings that differ from the checkpoint's; otherwise they are listed and refused."""
    trackers: tuple[
        Literal["tensorboard", "wandb", "mlflow", "aim", "comet_ml", "clearml", "dvclive", "swanlab", "trackio"], ...
    ] = ("tensorboard",)
    """Where to log besides TensorBoard: wandb (Weights & Biases), mlflow, aim, comet_ml, clearml, dvclive, swanlab,
    trackio; each needs its package."""
    wandb: bool = False
    """The same as wandb among the trackers."""


@dataclass(frozen=True)
class BasicEvalConfig:
    """The keys under `eval:` of every run: how predictions are made and evaluated."""

    batch_size: int = 32
    """Images per batch and process; metrics do not depend on it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of predictions; bf16 is several times faster on a GPU and changes results slightly."""
    workers: int = 2
    """Loader processes per process."""
    limit: int | None = None
    """Evaluate only the first N images; recorded in the result."""


@dataclass(frozen=True)
class EvalConfig(BasicEvalConfig):
    """The keys under `eval:` of a run with tokens: how they are decoded, besides the basic ones."""

    int8_cross_kv: bool = False
    """Keep the cross-attention keys and values in 8 bits: faster for large batches, changes a few tokens."""
    compile: bool = False
    """Use torch.compile for decoding; at full size this takes minutes, so it pays off for thousands of images."""
    temperature: float = 0.0
    """Sampling temperature of the LM; 0 is greedy decoding."""
    top_k: int | None = None
    """Sample from the k most likely tokens; no effect without a temperature."""
    top_p: float | None = None
    """Sample from the fewest most likely tokens that have this probability in all; no effect without a temperature."""
    steps: int | None = None
    """Masked: decoding steps, at most the number of tokens; null: one, all tokens in parallel."""
    choice_temperature: float = 0.0
    """Masked: noise in the order in which tokens are chosen; 0: the most confident first. No effect with one step."""
    seed: int = 0
    """Seed of sampling; each image has its own random stream."""
    codes: Literal["hard", "soft"] = "hard"
    """What the oracle's decoder gets: the codes of the LM's tokens (hard, as in the papers), or the mean code under the
    LM's distribution of each token (soft)."""
    code_scale: float = 1.0
    """Moves the LM's codes towards the empty code of code dropout: 1 leaves them as they are, 0 is context alone."""
    context_weight: float = 0.0
    """Mixes the prediction with context alone: 0 is the codes' prediction, 1 context alone; classes by probability."""
    samples: int = 1
    """Average this many sampled predictions per image (classes by probability); above 1 needs a temperature above 0."""
    tuned: bool = True
    """Apply the settings that `uvim-fsq tune` chose for the checkpoint (its decoding.json), except for keys that are
    given. Training's own evaluations never apply them."""


#: The keys of `eval` that say how tokens are chosen, as in `lm.sampling.Sampling`.
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "steps", "choice_temperature")


@dataclass(frozen=True)
class TaskSection:
    """The `task:` section: the task's registered name and its own frozen dataclass."""

    name: str
    options: Any


@dataclass(frozen=True)
class Ancestor:
    """A run whose weights another run started from, directly or through others."""

    run: str
    """Its checkpoint directory, or hub:OWNER/NAME@COMMIT."""
    weights: str
    """SHA-256 of its weights."""
    data_root: str
    """Its data.root."""
    train_split: str
    """The split that it was trained on."""
    selection_split: str
    """The split that chose its checkpoint; may be empty."""


@dataclass(frozen=True)
class OracleRun:
    """Stage I: train the oracle of a task."""

    task: Any
    """The task: `name` and the task's own keys."""
    plugins: tuple[str, ...] = ()
    """Python modules to import first; they can register your own tasks, quantizers and token models."""
    init_from: str = ""
    """Run or checkpoint directory, or hub:OWNER/NAME@REVISION, of another oracle to start from: weights of the same
    name and shape are taken, the others are listed and start as usual. Empty: a new model."""
    ancestors: tuple[Ancestor, ...] = ()
    """Not a setting: the runs that init_from led to, with what they were trained on, as training records them."""
    data: DataConfig = field(default_factory=DataConfig)
    model: OracleModelConfig = field(default_factory=OracleModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    stage: Literal["oracle"] = "oracle"
    """The stage that this file configures."""


@dataclass(frozen=True)
class LMRun:
    """Stage II: train the language model on a frozen oracle's tokens."""

    oracle: str
    """Run or checkpoint directory of the oracle; task, levels, patch size and token count are read from it."""
    task: Any = None
    """Read from the oracle's checkpoint; only keys of decoding and evaluation protocol may be overridden."""
    plugins: tuple[str, ...] = ()
    """Modules to import first. The oracle's are added, but must be listed here too unless trusted (--trust)."""
    init_from: str = ""
    """Run or checkpoint directory, or hub:OWNER/NAME@REVISION, of another LM, or a direct run for its image encoder,
    to start from: weights of the same name and shape are taken, the others are listed and start as usual. Empty: a new
    model."""
    ancestors: tuple[Ancestor, ...] = ()
    """Not a setting: the runs that init_from led to, with what they were trained on, as training records them."""
    data: DataConfig = field(default_factory=DataConfig)
    model: LMModelConfig = field(default_factory=LMModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    decoder_tuning: DecoderTuningConfig = field(default_factory=DecoderTuningConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    stage: Literal["lm"] = "lm"
    """The stage that this file configures."""
    given: tuple[str, ...] = field(default=(), compare=False, metadata={"internal": True})
    """Internal, not a setting: keys of `data` that were set explicitly and so are not inherited from the oracle."""


@dataclass(frozen=True)
class DirectRun:
    """The direct baseline: train an image encoder and a label head on the task's loss, without tokens."""

    task: Any
    """The task: `name` and the task's own keys."""
    plugins: tuple[str, ...] = ()
    """Python modules to import first; they can register your own tasks."""
    init_from: str = ""
    """Run or checkpoint directory, or hub:OWNER/NAME@REVISION, of another direct run, or an LM for its image encoder,
    to start from: weights of the same name and shape are taken, the others are listed and start as usual. Empty: a new
    model."""
    ancestors: tuple[Ancestor, ...] = ()
    """Not a setting: the runs that init_from led to, with what they were trained on, as training records them."""
    data: DataConfig = field(default_factory=DataConfig)
    model: DirectModelConfig = field(default_factory=DirectModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: BasicEvalConfig = field(default_factory=BasicEvalConfig)
    stage: Literal["direct"] = "direct"
    """The stage that this file configures."""


Run = OracleRun | LMRun | DirectRun
#: The value of `stage` -> the class of its configuration.
STAGES: dict[str, type[OracleRun] | type[LMRun] | type[DirectRun]] = {
    "oracle": OracleRun,
    "lm": LMRun,
    "direct": DirectRun,
}
