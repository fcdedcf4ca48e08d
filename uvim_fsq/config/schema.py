"""The configuration schema: frozen dataclasses, the string under a field is its documentation (shown by --help).

YAML files and `key=value` overrides are merged by OmegaConf and turned into these plain dataclasses at the border
(config_io.py). Stage II (`LMRun`) never retypes stage I: task, levels and architecture are read from the oracle's
checkpoint. Knows nothing of torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

#: Level presets of the FSQ paper (section 4), by the exponent of the codebook size they stand for.
LEVEL_PRESETS: dict[str, tuple[int, ...]] = {
    "2^8": (8, 6, 5),
    "2^10": (8, 5, 5, 5),
    "2^12": (7, 5, 5, 5, 5),
    "2^14": (8, 8, 8, 6, 5),
    "2^16": (8, 8, 8, 5, 5, 5),
}

#: The quantizers and token models of this package; plugins may register others.
QUANTIZERS = ("fsq", "vq")
TOKEN_MODELS = ("autoregressive",)


@dataclass(frozen=True)
class DataConfig:
    root: str = ""
    """Folder of the data set; relative paths are looked up under $UVIM_FSQ_DATA (default: datasets/), then here."""
    image_size: int = 512
    """Side in pixels of the square image and label map that the models see."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str = "val"
    """Split to evaluate on."""
    selection_split: str = ""
    """Split that training evaluates on; empty: eval_split. Any other picks the best checkpoint, by the task's main
    metric where the protocol reports that; else the last checkpoint is the run's result."""
    crop: Literal["inception", "none"] = "inception"
    """Training crop: inception (random area and aspect) or none (the whole image resized)."""
    crop_area: tuple[float, float] = (0.05, 1.0)
    """Smallest and largest share of the image's area that the inception crop keeps."""
    hflip: bool = True
    """Mirror half of the training samples."""
    workers: int = 4
    """Loader processes per training process; 0 loads in the main process."""
    cache: bool = False
    """Keep decoded samples in memory (small data sets; with workers > 0 each worker keeps its own)."""
    max_pixels: int = 250_000_000
    """Pixels of the largest picture or label map that is decoded; larger ones are refused by their headers."""
    max_bad_samples: int = 0
    """Unreadable training samples to skip and count before giving up; evaluation never skips."""


@dataclass(frozen=True)
class QuantizerConfig:
    kind: str = "fsq"
    """Quantizer of the bottleneck: fsq, vq (the baseline it replaces), or one that a plugin registers."""
    levels: tuple[int, ...] | Literal["2^8", "2^10", "2^12", "2^14", "2^16"] = (7, 5, 5, 5, 5)
    """FSQ levels per channel, or a preset: 2^8, 2^10, 2^12, 2^14, 2^16."""
    shift: Literal["published", "centered"] = "published"
    """Offset inside FSQ's tanh for even levels: as published (tan), or centered (atanh, bound(0) = 0)."""
    codebook_size: int = 4096
    """VQ: number of codewords; FSQ's is the product of its levels."""
    codeword_dim: int = 768
    """VQ: channels of a codeword; FSQ's is the number of its levels."""
    momentum: float = 0.995
    """VQ: of the running counts and sums behind the codewords."""
    split: bool = True
    """VQ: codebook splitting, rare codewords are replaced by halves of the most frequent."""
    commitment: float = 0.0
    """VQ: weight of the mean squared distance between the encoder's output and its codeword, in the loss."""


@dataclass(frozen=True)
class OracleModelConfig:
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
    """Number of tokens, a square number."""
    code_dropout: Literal["none", "random", "ordered"] = "random"
    """Codes zeroed in training: a random share of them, in random order, or always from the last on."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)


@dataclass(frozen=True)
class EncoderConfig:
    name: str = "vit_large_patch16_224"
    """Any timm ViT; its class token is left out and its size follows data.image_size."""
    weights: str = "none"
    """none, hub (timm's published weights, downloaded), or the path of a local .safetensors / .npz / .pth file."""
    act_layer: Literal["default", "gelu", "gelu_tanh"] = "default"
    """Activation of the MLPs; gelu_tanh is the reference's."""
    patch_size: int | None = None
    """Overrides the named model's patch size."""
    width: int | None = None
    """Overrides the named model's width."""
    depth: int | None = None
    """Overrides the named model's depth."""
    num_heads: int | None = None
    """Overrides the named model's attention heads."""
    mlp_dim: int | None = None
    """Overrides the named model's MLP width."""


@dataclass(frozen=True)
class LMModelConfig:
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
    """Dropout on the residual branches and token embeddings of the decoder in training."""
    kind: str = "autoregressive"
    """Token model: autoregressive (the papers' encoder-decoder), or one that a plugin registers."""


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adafactor", "adamw"] = "adafactor"
    """adafactor (the reference's) or adamw (torch's)."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 1e-5
    """Decoupled weight decay of kernels (matrices): times the schedule (adafactor), times the rate (adamw)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Momentum and (largest) second-moment decay."""
    warmup_steps: int = 4000
    """Steps of linear warm-up from rate 0 before the cosine; fewer than the run has."""
    final_lr_ratio: float = 0.0
    """Learning rate at the end as a share of the peak."""
    clip_norm: float | None = 1.0
    """Global gradient norm to clip at; null for none."""
    encoder_lr_ratio: float = 1.0
    """Rate multiplier of the LM's image encoder (the reference: 0.1); no effect in stage I."""


@dataclass(frozen=True)
class TrainConfig:
    out: str = ""
    """Run directory."""
    batch_size: int = 1024
    """Global batch over all processes and accumulation steps."""
    epochs: float | None = None
    """Length of training in epochs; give this or steps."""
    steps: int | None = None
    """Length of training in optimizer steps."""
    seed: int = 0
    """Seed of initialisation, data order, augmentation and dropout."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the forward and backward pass; master weights stay float32."""
    accumulate: int = 1
    """Micro-batches per optimizer step and process. They need not be of equal size."""
    compile: bool = False
    """torch.compile the model and, in stage II, the oracle that makes its tokens."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, used for evaluation and saved; null for none."""
    log_every: int = 50
    """Steps between log lines."""
    eval_every: int | None = None
    """Steps between evaluations; null: only at the end."""
    eval_limit: int | None = None
    """Images per evaluation in training; null: the whole split. The run's result is of all of eval_split."""
    save_every: int | None = None
    """Steps between checkpoints; null: only at the end and on interruption."""
    keep: int = 2
    """Latest checkpoints kept, beside the best where one is picked (data.selection_split)."""
    resume: Literal["no", "auto"] | str = "no"
    """no (refuse a run directory with checkpoints), auto (continue if there is one) or a checkpoint's path; newer
    checkpoints of that run are then moved to its folder set_aside/."""
    resume_changes: bool = False
    """On resume, go on with settings that differ from the checkpoint's; without it they are listed and refused."""
    wandb: bool = False
    """Log to Weights & Biases too (needs the wandb package)."""


@dataclass(frozen=True)
class EvalConfig:
    batch_size: int = 32
    """Images per step and process; figures do not depend on it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of predictions; bf16 is several times faster on a GPU and changes a few tokens."""
    int8_cross_kv: bool = False
    """Decode with the cross-attention's keys and values in 8 bits: faster for large batches, changes a few tokens."""
    compile: bool = False
    """torch.compile the LM's decoding step; it takes minutes at full size, so for many thousands of images."""
    workers: int = 2
    """Loader processes."""
    limit: int | None = None
    """Evaluate the first N images only; named in the result."""
    temperature: float = 0.0
    """Sampling temperature of the LM; 0 is greedy."""
    top_k: int | None = None
    """Sample among the k likeliest tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens that hold this probability."""
    seed: int = 0
    """Seed of sampling; each image draws from its own stream."""


@dataclass(frozen=True)
class TaskSection:
    """The `task:` section: the registry's name and the task's own frozen dataclass."""

    name: str
    options: Any


@dataclass(frozen=True)
class OracleRun:
    """Stage I: train a task's oracle."""

    task: Any
    """The task: `name` and the task's own keys."""
    plugins: tuple[str, ...] = ()
    """Python modules to import first; they register tasks of your own."""
    data: DataConfig = field(default_factory=DataConfig)
    model: OracleModelConfig = field(default_factory=OracleModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    stage: Literal["oracle"] = "oracle"
    """Which of the two stages this file is about."""


@dataclass(frozen=True)
class LMRun:
    """Stage II: train the language model on a frozen oracle's tokens."""

    oracle: str
    """Run or checkpoint directory of the oracle; task, levels, patch and token count are read from it."""
    task: Any = None
    """Filled from the oracle's checkpoint; keys that only concern decoding and protocol may be overridden."""
    plugins: tuple[str, ...] = ()
    """Modules to import first; the oracle's are added, and must be named here too unless they are trusted (--trust)."""
    data: DataConfig = field(default_factory=DataConfig)
    model: LMModelConfig = field(default_factory=LMModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    stage: Literal["lm"] = "lm"
    """Which of the two stages this file is about."""
    given: tuple[str, ...] = field(default=(), compare=False, metadata={"internal": True})
    """Keys of `data` that were given and so are not inherited from the oracle; kept by the loader, no setting."""


Run = OracleRun | LMRun
