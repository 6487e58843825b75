"""The sections of a config. Unknown and ill-typed keys are errors that name the key.

The text under each field is its documentation: the configuration reference in docs/config.md is generated
from it (``python -m dive_fast.methods.run_config``).
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from dive_fast.config.origins import Origins
from dive_fast.config.section import (
    Decay,
    HeldOut,
    NonNegative,
    NonNegativeFloat,
    PathText,
    Positive,
    Scale,
    Section,
    Share,
)
from dive_fast.errors import nearest

Loader = Literal["plain", "dali", "ffcv"]
Metric = Literal[
    "top1",
    "top5",
    "mean_class_recall",
    "macro_f1",
    "worst_region",
    "image_to_text_r1",
    "image_to_text_r5",
    "image_to_text_r10",
    "text_to_image_r1",
    "text_to_image_r5",
    "text_to_image_r10",
    "soft_accuracy",
]


Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


LoraTarget = Literal["q", "k", "v", "out", "mlp"]
Tower = Literal["image", "text"]


class LoraConfig(Section):
    """Low-rank adapters, W = W0 + (alpha / rank) B A: A and B are trained instead of the towers' weights W0."""

    rank: Positive = 8
    """Rows of A and columns of B, at most the smaller side of each adapted layer."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The product B A counts alpha / rank times. Default: `rank`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the inputs of A that each step drops at random."""
    targets: Annotated[list[LoraTarget], Field(min_length=1)] = Field(default=["q", "k", "v", "out"])
    """Adapted layers of each transformer block: the projections of attention to queries, keys and values, its
    output, and `mlp`, all linear layers of the MLP. A layer that computes several projections by one weight, as in
    towers of timm, needs all of them."""
    towers: Annotated[list[Tower], Field(min_length=1)] = Field(default=["image", "text"])
    """Adapted towers; the other one is frozen. A method without texts adapts the image tower alone."""


class ModelConfig(Section):
    """Which two-tower open_clip model is tuned."""

    name: PathText
    """open_clip model name (`ViT-B-16-quickgelu`), `hf-hub:owner/repo`, `local-dir:folder`, `hf:` with a CLIPModel
    or SiglipModel of transformers (a hub id such as `hf:openai/clip-vit-base-patch32`, or a folder), or `demo`,
    the small model shipped with the project."""
    pretrained: PathText | None = None
    """open_clip's pretrained tag (`openai`) or a checkpoint file. Not used with `hf-hub:`, `local-dir:`, `hf:` and
    `demo`, which bring their weights. `open_clip_config.json` next to a file says how its images are preprocessed,
    and of which architecture it is; every run exports one."""
    random: bool = False
    """Start from random weights, on purpose: the same ones in every command and run. Otherwise a model without
    `pretrained` is an error."""
    logit_scale_max: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Upper bound of the logit scale s = 1 / tau. open_clip and OpenAI's CLIP bound it at 100; FLYP and the paper
    do not (null). The loss sees min(s, bound); above the bound only gradients that lower s are let through."""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights (docs/adapters.md); the logit scale and a head are trained as without
    them. Exports have the merged weights. Needs `pip install 'dive_fast[lora]'`. Default: all weights."""
    freeze: list[str] = Field(default=[])
    """Parameters that are not trained: patterns of their names, such as `visual.*.ln_*` or `logit_scale`, and
    open_clip's locks of a tower, `image` and `text`, or `image:N` and `text:N`, which leave its last N groups
    unlocked: the projection, the last block with its layer norm, and one group for each block before it."""
    license: str | None = None
    """License of the tuned model for its model card, an identifier of Hugging Face such as `apache-2.0`. Default:
    unknown, so that of the pre-trained weights applies."""

    @model_validator(mode="after")
    def _check_weights(self) -> "ModelConfig":
        if self.random and self.pretrained is not None:
            raise ValueError(
                "model.random = true starts from random weights, model.pretrained names others; keep one"
            )
        return self


class TargetConfig(Section):
    """The labelled data set to fine-tune on. Paths beginning with `demo:` lie in the embedded demo."""

    format: Literal["folder", "webdataset", "csv", "vqa", "huggingface", "prepared"]
    """`folder`: one folder a class, as torchvision's ImageFolder. `webdataset`: tars of image + `.cls`. `csv`:
    tab-separated with columns `title` and `filepath`, as FLYP has it: rows of one file are its prompts. `vqa`: a
    JSON file of questions in VQAv2's form; the prompt of each is `question: ... answer: ...` with its most
    frequent answer (docs/vqa.md).
    `huggingface`: a data set of Hugging Face's `datasets`, written by `save_to_disk`, or parquet or arrow files.
    `prepared`: the output of `dive-fast prepare` for any of them."""
    path: PathText
    """Root folder, tar (a brace range such as `{00000..00012}.tar`, a glob or a folder of tars), CSV file, or
    the prepared folder."""
    split: str | None = None
    """`huggingface` only: the split of a set that has several, e.g. `train`."""
    image_column: str | None = None
    """`huggingface` only: the column of images; default: the first image column."""
    label_column: str | None = None
    """`huggingface` only: the column of labels; default: the only ClassLabel column."""
    text_column: str | None = None
    """`huggingface` only: a column of texts, one or a list for each image, which are prompts instead of labels."""
    image_root: PathText | None = None
    """`csv` and `vqa` only: the folder that file names start from; default: that of the file at `path`."""
    annotations: PathText | None = None
    """`vqa` only: the JSON file of the answers. Default: the file next to the questions with VQAv2's name, or the
    entries of the questions themselves."""
    class_names: PathText | None = None
    """`imagenet`, or a text file with one class name a line in label order. `folder` defaults to its folders'
    names, `prepared` to those it was prepared with. Not used with `csv` and `vqa`."""
    templates: PathText = "imagenet"
    """`imagenet` (open_clip's 80), `simple` (open_clip's 7), a text file with one template a line, or one
    template; `{}` stands for the class name. One is drawn for each sample and epoch."""
    balance: Literal["none", "class"] = "none"
    """`none`: each image once an epoch. `class`: each class equally often, in epochs of the same length: images of
    small classes are repeated, with other crops and prompts."""
    crop_scale: tuple[Scale, Scale] = (0.9, 1.0)
    """Range of the share of an image's area that its random crop covers; open_clip fine-tunes with 0.9 to 1. A
    smaller share is a stronger augmentation."""
    horizontal_flip: Share = 0.0
    """Probability that an image is mirrored from left to right. Not for texts that name a side."""
    loader: Loader = "plain"
    """Image decoder. `plain`: PIL, in processes. `dali`: DALI, on the GPU if there is one. `ffcv`:
    threads over FFCV's memory-mapped file, made by `dive-fast prepare --container beton`. Samples, order, crops
    and texts are the same."""
    batch_size: Positive = 512
    """B, over all ranks."""
    workers: NonNegative = 4
    """On each rank: decoding processes (`plain`) or threads (`dali`, `ffcv`); 0 decodes in the training
    process. `auto`: by the cores of this rank and the images of both halves (docs/data.md)."""
    hw_decoder_load: Share = 0.65
    """`dali` on a GPU: the share of JPEGs that its hardware decoder takes; the best depends on `workers`."""
    holdout: HeldOut | None = None
    """Share of each class that is not trained on (rounded, at least one image): the part that a set of
    `evaluate.sets` with the same `path` and `holdout` measures. A hash of each sample's name chooses it, whatever
    the seed. Not for `csv`. Default: all samples are trained on."""
    classes: Literal["all", "base", "new"] = "all"
    """`base`: only the first half of the classes, in label order, and `new`: only the others, as evaluations of
    prompt learning have it (docs/prompts.md). Not for sets with prompts."""
    shots: Positive | None = None
    """Number of images of each class that are trained on; all of a class that has fewer. Not for sets with
    prompts. Default: all."""
    shots_seed: NonNegative = 1
    """Seed of the choice of `shots`, whatever `train.seed`: a hash of it with each sample's name chooses."""
    text_length: Positive | None = None
    """Context length of the prompts; longer ones are cut. Default: the model's, trimmed to each batch's longest
    prompt where that is exact."""

    @property
    def has_prompts(self) -> bool:
        """Whether the images have prompts instead of classes."""
        return self.format in ("csv", "vqa") or self.text_column is not None


class ReferenceConfig(Section):
    """Image-caption pairs that resemble the pre-training data; they keep the geometry of the embeddings."""

    format: Literal["folder", "webdataset", "csv", "vqa", "huggingface", "prepared"]
    """`folder`: images at any depth, each with its captions in a file of the same name and suffix `.txt`.
    `webdataset`: tars of image + `.txt`. `csv`: tab-separated with columns `title` and `filepath`; every row is a
    pair. `vqa`: as in `data.target`; every question with its answer is a pair.
    `huggingface`: as in `data.target`. `prepared`: the output of `dive-fast prepare` for any of them."""
    path: PathText
    """Root folder, tar (a brace range, a glob or a folder of tars), CSV file, or the prepared folder."""
    split: str | None = None
    """`huggingface` only: as in `data.target`."""
    image_column: str | None = None
    """`huggingface` only: as in `data.target`."""
    text_column: str | None = None
    """`huggingface` only: the column of captions, one or a list for each image; default: the only column of
    texts."""
    captions: Literal["one", "lines"] = "one"
    """`one`: an image has one caption, its text, also of several lines; of several texts the first. `lines`: each
    line of a `.txt` file, each text of a list, and each csv row of the same image is a caption; one is drawn for
    each image and epoch."""
    order: Literal["indexed", "stream"] = "indexed"
    """`indexed`: every pair is known before the first step, and each epoch shuffles all of them. `stream`, for
    `webdataset` with `teacher.mode = online`: each tar is listed when it is reached, tars are shuffled, and pairs
    within `stream_buffer`; nothing is scanned at the start (docs/data.md)."""
    stream_buffer: Positive = 20_000
    """With `order = stream`: each rank shuffles the pairs of its next tars that have at least so many together."""
    image_root: PathText | None = None
    """`csv` and `vqa` only: as in `data.target`."""
    annotations: PathText | None = None
    """`vqa` only: as in `data.target`."""
    loader: Loader = "plain"
    """Image decoder. `plain`: PIL, in processes. `dali`: DALI, on the GPU if there is one. `ffcv`:
    threads over FFCV's memory-mapped file, made by `dive-fast prepare --container beton`. Samples, order, crops
    and texts are the same."""
    batch_size: Positive = 512
    """B', over all ranks."""
    workers: NonNegative = 4
    """On each rank: decoding processes (`plain`) or threads (`dali`, `ffcv`); 0 decodes in the training
    process. `auto`: by the cores of this rank and the images of both halves (docs/data.md)."""
    hw_decoder_load: Share = 0.65
    """`dali` on a GPU: the share of JPEGs that its hardware decoder takes; the best depends on `workers`."""
    text_length: Positive | None = None
    """Context length of the captions; longer ones are cut. Default: the model's, trimmed to each batch's longest
    caption where that is exact."""
    views: Literal["eval"] | Positive = "eval"
    """`eval`: the model's evaluation view of each image. A number K: K fixed random crops of each image, taken in
    turn epoch by epoch."""


class DataConfig(Section):
    """The training data."""

    target: TargetConfig
    reference: ReferenceConfig | None = None
    """Needed by every method with a reference loss."""


class ObjectiveConfig(Section):
    """The method: a loss on the target batch and one on the reference batch."""

    model_config = ConfigDict(extra="allow")

    name: str | None = "dive"
    """Method of a paper, listed below with its options, which stand in this section."""
    weight: NonNegativeFloat | None = None
    """Weight of the reference batch's loss. Default: the method's, listed below."""
    reference_every: Positive = 1
    """k: only every k-th step has a reference batch, which then counts k times as much, and moves averages as k
    steps would. The expected gradient stays; its noise grows."""
    target: str | dict[str, Any] | None = None
    """Target loss instead of the method's own: a name, or `{"name": ..., option: value}`."""
    reference: str | dict[str, Any] | None = None
    """Reference loss instead of the method's own, likewise; `none` for no reference batch."""


NO_PROJECTION = "none"
"""Value of ``projection.name`` without a method in weight space."""


class ProjectionConfig(Section):
    """A method in weight space, which keeps the weights near the pre-trained ones, with any objective."""

    model_config = ConfigDict(extra="allow")

    name: str = NO_PROJECTION
    """`none`, or one of the rules listed below with their options, which stand in this section. They act around
    each update and need all weights on the GPUs: ZeRO 0, 1 or 2 without offload."""


class TeacherConfig(Section):
    """Source of the frozen model's embeddings of the reference batch, which are always computed in fp32."""

    mode: Literal["cache", "online"] = "cache"
    """`cache`: the reference set is embedded once, before training. `online`: at every step, by a frozen copy."""
    path: PathText | None = None
    """Folder of the cache; default: `teacher` in the run folder. Name one to share a cache between runs."""
    batch_size: Positive = 256
    """Pairs embedded at once on each rank while the cache is written."""
    dtype: Literal["float32", "float16"] = "float32"
    """Dtype of the cached embeddings; `float16` halves the disk space, and rounding lengthens difference
    vectors."""
    audit: NonNegative = 64
    """Pairs of the cache that are embedded again and compared before training; 0: none."""
    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Largest difference between a cached and a recomputed unit row that the audit allows; default: 1e-4 for
    `float32`, 1e-3 for `float16`. Raise it knowingly, for embeddings computed in half precision elsewhere: it is
    noise on every difference vector."""
    verify: bool = True
    """Validate the checksum of each block of the cache when it is first read."""


class TrainConfig(Section):
    """Optimization, precision and checkpoints. The learning rate has a linear warm-up and decays by a cosine."""

    output: PathText | None = None
    """Run folder; default: `runs/` and the config's name."""
    epochs: Positive = 10
    """Passes over the target set."""
    max_steps: Positive | None = None
    """Upper limit of steps; the learning-rate schedule ends there too. Default: all epochs."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the order of samples, the crops and the prompts, which it determines exactly."""
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Autocast precision of the towers; weights and losses stay in fp32. fp16 scales the loss dynamically. bf16 is
    too coarse for difference vectors of 1e-3 (docs/precision.md) and warns."""
    schedule: Literal["sequential", "joint", "auto"] = "sequential"
    """`sequential`: backward of the target half before the forward of the reference half, least memory. `joint`:
    both halves in one forward and backward. The gradients are the same. `auto`: the one predicted to be faster on
    this GPU among those that fit (docs/performance.md)."""
    micro_batch_size: Positive | None = None
    """Pairs that a rank encodes at once, by cached embedding gradients: the memory of a small
    batch, the gradients of the full batch. Default: the full batch."""
    activation_checkpointing: Literal["off", "selective", "full"] = "off"
    """Saves memory for time. `selective`: recomputes the activation of each MLP in the backward, without matrix
    products except, under ZeRO-3, the one after the activation. `full`: transformer blocks keep only their inputs
    and run again in the backward."""
    fast_blocks: bool = True
    """Fused kernels between the matrix products of open_clip's transformer blocks, and a last block that computes
    only the token that is pooled. Other towers keep their blocks; the log says which."""
    compile: bool = False
    """torch.compile of the towers' transformer blocks. The first steps take minutes; not with ZeRO-3. Off by
    default, since the fused kernels of the blocks move fewer bytes than torch.compile's fusion of plain blocks
    (docs/performance.md). For towers without fused kernels, try it."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """`sgd`: SGD with momentum, whose weight decay is part of the gradient, as prompts are learned with. It needs
    ZeRO 0, and `deepspeed.zero_optimization.stage = "auto"` is 0 with it."""
    learning_rate: NonNegativeFloat = 1e-5
    """Peak learning rate."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor on the learning rate from each transformer block to the one before it. The last block has one factor,
    the first one as many as there are blocks, the embeddings before it one more; projections, the last layer norm,
    the logit scale and a head have none. Default: one learning rate."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay. Default with a `projection`: 0, since decay pulls to zero and not to the pre-trained
    weights."""
    decay_all_parameters: bool = True
    """Decay every parameter, as FLYP and the paper do; false exempts biases, gains and logit_scale."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    """Epsilon of AdamW."""
    momentum: Decay = 0.9
    """Momentum of SGD."""
    warmup_steps: NonNegative = 500
    """Steps of the warm-up, in which the learning rate rises linearly to its peak."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, e.g. 0.999, which averages over 1 / (1 - decay) steps
    and begins with the pre-trained weights. Skipped steps do not move it. It changes neither training nor the
    weights, and is exported as `ema.safetensors`. Not with ZeRO-3."""
    export_ema: bool = False
    """Export the averaged weights of `ema` as `model.safetensors`, instead of `ema.safetensors` next to the last
    weights: evaluations measure, and `evaluate.select` selects, the averaged weights."""
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    trace_steps: NonNegative = 0
    """Steps that torch's profiler traces after the first ten; the trace is in the run folder. 0: none."""
    checkpoint_every: Positive | None = None
    """Steps between checkpoints. One is always written before an evaluation, when the run is asked to stop, and at
    the end."""
    keep_last: Positive = 2
    """Number of newest checkpoints that are kept."""
    keep_best: bool = False
    """Whether the checkpoint of the best step on `evaluate.select` is kept too, e.g. to continue training."""
    on_save_error: Literal["continue", "stop"] = "continue"
    """Action if a checkpoint cannot be written, e.g. to a full disk. `continue`: warn, and try again when the next
    is due. `stop`: end the run. Older checkpoints are unchanged. The last checkpoint must be written."""
    resume: PathText = "auto"
    """`auto`: continue from the run folder's newest complete checkpoint, if any. `never`: start over. Otherwise
    a checkpoint's folder. The number of ranks and the ZeRO stage may differ from those of the checkpoint."""
    nonfinite_limit: Positive = 20
    """Steps in a row with a loss or gradient that is not finite after which the run stops and writes their samples
    to a file. Such steps are skipped. Overflows of fp16's loss scale do not count."""
    rank_timeout: Annotated[float, Field(ge=1, le=3600)] = 600.0
    """Seconds without a step after which all ranks end with an error that names the one they wait for. A dead rank
    is detected within 60 seconds, or within this time if it is shorter. Evaluations and the start are not
    timed."""


class EvaluationSet(Section):
    """An image set that the model is measured on: the user's, by `format`, or a known one, by `dataset`."""

    format: Literal["folder", "webdataset", "vqa", "huggingface", "prepared"] | None = None
    """As in `data.target`, for retrieval as in `data.reference`. Not used with `dataset`, whose layout is
    detected."""
    path: PathText
    """As in `data.target`. With `dataset`: its folder, or one above; `{dataset}` stands for its name."""
    dataset: str | None = None
    """A known data set, e.g. `imagenet-r` or `food101` (docs/evaluation.md): its layout, label map, class names,
    templates and metric."""
    split: str | None = None
    """`huggingface` only: as in `data.target`."""
    image_column: str | None = None
    """`huggingface` only: as in `data.target`."""
    label_column: str | None = None
    """`huggingface` only: as in `data.target`."""
    text_column: str | None = None
    """`huggingface` with `task = retrieval` only: as in `data.reference`."""
    image_root: PathText | None = None
    """`vqa` only: as in `data.target`."""
    annotations: PathText | None = None
    """`vqa` only: as in `data.target`."""
    answers: PathText | None = None
    """`task = vqa` only: a text file with a candidate answer on each line, made by `dive-fast answers` from the
    training questions."""
    questions: Positive | None = None
    """`task = vqa` only: the number of questions that are measured, spread evenly over the set; each is combined
    with all candidates. Default: all."""
    holdout: HeldOut | None = None
    """Measures only the part of the set that `data.target.holdout` leaves out of training; both shares must be
    equal. Samples that cannot be read are in neither part. Not used with `dataset`. Default: the complete set."""
    classes: Literal["all", "base", "new"] = "all"
    """As in `data.target`: the set is measured on these classes alone. A `base` and a `new` part of one set have a
    harmonic mean."""
    task: Literal["classification", "retrieval", "vqa"] = "classification"
    """`retrieval`: ranks all captions for each image, and all images for each caption; needs captions, where each
    line of a text is one, or a `dataset` of captions. `vqa`: ranks all `answers` for each question
    (docs/vqa.md)."""
    class_names: PathText | None = None
    """As in `data.target`, or `caltech101`, `eurosat`, `flowers` or `pets`. Default with `dataset`: its own."""
    templates: PathText | None = None
    """As in `data.target`, or one of the ten zero-shot sets (docs/evaluation.md), `iwildcam` or `fmow`, for its
    own; the prompts of a class are averaged. Default: `imagenet`, or with `dataset` its own."""
    metric: Metric | None = None
    """Metric reported for the set. Default: `top1`, for retrieval `image_to_text_r1`, for vqa `soft_accuracy`, or
    with `dataset` its own."""
    on_skipped: Literal["error", "report"] = "error"
    """Samples that cannot be measured: without an image, label or caption, or with an image that cannot be
    decoded. `error`: the set is refused. `report`: the others are measured, and logs, tables and results count
    those left out. Not used with `dataset`, which is measured completely."""
    role: Literal["id", "ood", "zero_shot"] | None = None
    """Average of the results table that the set enters. Default: none, or with `dataset` its own."""


class GeometryConfig(Section):
    """Captioned images on which the tuned embeddings are compared with the pre-trained ones."""

    format: Literal["folder", "webdataset", "csv", "huggingface", "prepared"]
    """As in `data.reference`; of several captions of an image, the first is measured."""
    path: PathText
    """As in `data.reference`. Preferably a set that is not trained on; the paper uses Flickr8K."""
    split: str | None = None
    """`huggingface` only: as in `data.reference`."""
    image_column: str | None = None
    """`huggingface` only: as in `data.reference`."""
    text_column: str | None = None
    """`huggingface` only: as in `data.reference`."""
    image_root: PathText | None = None
    """As in `data.reference`."""
    pairs: Positive = 2000
    """Number of pairs, spread evenly over the set; the time to compare them grows with its square."""


class EvaluateConfig(Section):
    """Data sets that the tuned model is measured on, during training and at its end."""

    sets: dict[str, EvaluationSet] = Field(default={})
    """Name -> data set; its `metric` goes to the metrics as `accuracy/<name>`. `null` removes a set of the
    `base`."""
    geometry: GeometryConfig | None = None
    """Pairs on which RSA, CKA and difference vectors are measured too (docs/geometry.md); the metrics have them as
    `geometry/<name>`."""
    baseline: bool = True
    """Measure the pre-trained model on all sets too, for the report at the end of a run. The values are stored in
    the run folder."""
    probe: NonNegative = 500
    """Number of pairs of `data.reference` that are held out of training, at most a tenth of the set. Recall@1 and
    RSA on them, before and after training, show how much the model forgets (docs/evaluation.md). 0: none, as
    where fewer than 50 pairs can be held out."""
    every_steps: Positive | None = None
    """Steps between evaluations during training; default: none."""
    every_epochs: Positive | None = None
    """The same in epochs."""
    during: list[str] | None = None
    """The sets measured during training; default: all."""
    select: str | None = None
    """The set, ID validation, that selects weights: the run ends with those of the best evaluation during
    training. Default: the last weights."""
    patience: Positive | None = None
    """Evaluations without a better accuracy on `select` after which training ends (early stopping)."""
    ema: bool = False
    """Measure the averaged weights of `train.ema` too; the metrics have them as `ema_accuracy/<name>`."""
    batch_size: Positive = 256
    """Images encoded at once on each rank."""
    loader: Loader = "plain"
    """Image decoder of the sets. Default: `data.target.loader`. `plain` decodes sets that it cannot read; a
    line says why."""
    workers: NonNegative = 4
    """Loader processes on each rank; `auto`: by its cores. Default: those of `data.target`."""

    @field_validator("sets", mode="before")
    @classmethod
    def _remove_null_sets(cls, sets: Any) -> Any:
        return {name: each for name, each in sets.items() if each is not None} if isinstance(sets, dict) else sets


MONITORS = {
    "tensorboard": 'set track=["tensorboard"] instead',
    "wandb": 'set track=["wandb"] instead',
    "csv_monitor": "metrics.jsonl has each line, so remove it",
    "comet": "name other trackers in track",
}
"""DeepSpeed's own monitors, with their replacements."""


def _as_list(names: Any) -> Any:
    """Names as a list, as ``track=wandb`` or ``track=[wandb,mlflow]`` on the command line; without repetitions."""
    names = [name.strip() for name in names.strip("[]").split(",")] if isinstance(names, str) else names
    return (
        list(dict.fromkeys(names)) if isinstance(names, list) and all(isinstance(n, str) for n in names) else names
    )


class Config(Section):
    """All sections. :class:`dive_fast.methods.run_config.RunConfig` validates options of methods too."""

    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    projection: ProjectionConfig = ProjectionConfig()
    teacher: TeacherConfig = TeacherConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    track: Annotated[list[Tracker], BeforeValidator(_as_list)] = Field(default=[])
    """Experiment trackers that receive the lines of metrics.jsonl: any of `tensorboard`, `wandb`, `mlflow` and
    `trackio` (docs/tracking.md). Each needs its package: `pip install 'dive_fast[wandb]'`."""
    deepspeed: dict[str, Any] = Field(default={})
    """Passed to DeepSpeed unchanged. Batch sizes, optimizer, scheduler and precision belong to the sections above:
    the engine fills DeepSpeed's keys from there, and a contradiction is an error. One value is ours:
    `zero_optimization.stage` may be `"auto"`, which is 1 on several ranks or with offload, otherwise 0."""
    _origins: Origins = PrivateAttr(default_factory=Origins)

    @property
    def origins(self) -> Origins:
        """Where the values come from; no part of the config's value."""
        return self._origins

    def set_origins(self, origins: Origins) -> None:
        """Records where the values come from."""
        self._origins = origins

    @classmethod
    def drop_inherited(cls, tree: dict[str, Any], inherited: Mapping[str, Mapping[str, Any]]) -> None:
        """Removes keys of ``objective`` that were set for another method; without methods, keeps all.

        Args:
            tree: the config before validation; changed in place.
            inherited: dotted keys of its ``objective`` that were set for another method, each with the
                ``objective`` that they were set for.
        """

    @model_validator(mode="after")
    def _default_weight_decay(self) -> "Config":
        """A projection's default of ``train.weight_decay`` is 0."""
        if self.projection.name == NO_PROJECTION or "weight_decay" in self.train.model_fields_set:
            return self
        return self.model_copy(update={"train": self.train.model_copy(update={"weight_decay": 0.0})})

    @model_validator(mode="after")
    def _default_loader(self) -> "Config":
        """Evaluations load images as training does, unless they have a loader or workers of their own."""
        target, options = self.data.target, self.evaluate
        defaults = {"loader": target.loader, "workers": target.workers}
        missing = {name: value for name, value in defaults.items() if name not in options.model_fields_set}
        return self.model_copy(update={"evaluate": options.model_copy(update=missing)}) if missing else self

    @model_validator(mode="after")
    def _check_deepspeed(self) -> "Config":
        for key, value in self.deepspeed.items():
            if key in MONITORS:
                raise ValueError(f"deepspeed.{key}: DeepSpeed's monitors are not used; {MONITORS[key]}")
            try:
                json.dumps(value, allow_nan=False)
            except ValueError as error:
                raise ValueError(f"deepspeed.{key} has a number that is not finite; remove it") from error
        return self

    @model_validator(mode="after")
    def _check_evaluation(self) -> "Config":
        options = self.evaluate
        names = [("evaluate.during", name) for name in options.during or ()]
        names += [("evaluate.select", options.select)] if options.select is not None else []
        for key, name in names:
            if name not in options.sets:
                raise ValueError(f"{key}: evaluate.sets has no {name}{nearest(name, list(options.sets))}")
        if options.every_steps is not None and options.every_epochs is not None:
            raise ValueError("evaluate.every_steps and every_epochs: set only one of them")
        if self.train.export_ema and options.ema:
            raise ValueError("evaluate.ema: with train.export_ema accuracy/<name> is that of the averaged weights")
        if (self.train.export_ema or options.ema) and self.train.ema is None:
            key = "train.export_ema" if self.train.export_ema else "evaluate.ema"
            raise ValueError(f"{key} needs train.ema, the decay of the average; set it, e.g. to 0.999")
        is_periodic = options.every_steps is not None or options.every_epochs is not None
        if not is_periodic and (options.during is not None or options.select is not None):
            raise ValueError("evaluate.during and evaluate.select need every_steps or every_epochs")
        if self.train.keep_best and options.select is None:
            raise ValueError("train.keep_best needs evaluate.select, the set that decides which is best")
        if options.select is not None and options.during is not None and options.select not in options.during:
            raise ValueError(f"evaluate.during: add {options.select}, the set of evaluate.select")
        if options.patience is not None and options.select is None:
            raise ValueError("evaluate.patience needs evaluate.select: the set that has to improve")
        return self

    @model_validator(mode="after")
    def _check_optimizer(self) -> "Config":
        if self.train.optimizer == "sgd" and self.projection.name != NO_PROJECTION:
            raise ValueError(
                f"train.optimizer = sgd: projection.name = {self.projection.name} is a rule around AdamW's step; "
                "set train.optimizer=adamw"
            )
        return self

    @model_validator(mode="after")
    def _check_data(self) -> "Config":
        reference = self.data.reference
        for key, section in (("data.target", self.data.target), ("data.reference", reference)):
            if section is None:
                continue
            if section.image_root is not None and section.format not in ("csv", "vqa"):
                raise ValueError(f"{key}.image_root: only csv and vqa data have one; remove it")
            if section.annotations is not None and section.format != "vqa":
                raise ValueError(f"{key}.annotations: only vqa data has them; remove it")
            if section.loader == "ffcv" and section.format != "prepared":
                raise ValueError(
                    f"{key}.loader = ffcv reads prepared sets alone: make one by dive-fast prepare "
                    f"--container beton, then set {key}.format=prepared"
                )
        if self.data.target.format == "webdataset" and self.data.target.class_names is None:
            raise ValueError("data.target.class_names: webdataset data needs imagenet or a text file of names")
        _check_sampling(self.data.target)
        for key in ("holdout", "classes", "shots"):
            if getattr(self.data.target, key) not in (None, "all"):
                _check_subset(self.data.target, f"data.target.{key}")
        if reference is not None and reference.order == "stream":
            _check_stream(reference, self.evaluate)
        for name, evaluation in self.evaluate.sets.items():
            _check_evaluation_set(f"evaluate.sets.{name}", evaluation)
            _check_held_out_set(f"evaluate.sets.{name}", evaluation, self.data.target)
        sections: dict[str, Section | None] = {"data.target": self.data.target, "data.reference": reference}
        sections |= {f"evaluate.sets.{name}": each for name, each in self.evaluate.sets.items()}
        for key, described in (sections | {"evaluate.geometry": self.evaluate.geometry}).items():
            _check_columns(key, described)
        return self


COLUMNS = ("split", "image_column", "label_column", "text_column")
"""Keys that only sets of format `huggingface` have."""


def _check_columns(key: str, section: Section | None) -> None:
    values = {} if section is None else {name: getattr(section, name, None) for name in COLUMNS}
    name = next((name for name, value in values.items() if value is not None), None)
    if name is not None and getattr(section, "format", None) != "huggingface":
        raise ValueError(f"{key}.{name}: only huggingface data has one; remove it")
    if values.get("label_column") is not None and values["text_column"] is not None:
        raise ValueError(f"{key}: label_column and text_column: set only one of them")


def _check_sampling(target: TargetConfig) -> None:
    low, high = target.crop_scale
    if low > high:
        raise ValueError(f"data.target.crop_scale: {low:g} is more than {high:g}; set the smaller share first")
    if target.balance == "class" and target.has_prompts:
        origin = "text_column" if target.text_column is not None else target.format
        raise ValueError(
            f"data.target.balance = class: a set of {origin} has prompts and no classes; set "
            "data.target.balance=none"
        )


def _check_stream(reference: ReferenceConfig, evaluate: EvaluateConfig) -> None:
    if reference.format != "webdataset":
        raise ValueError(
            f"data.reference.order = stream reads webdataset tars, not {reference.format}; set "
            "data.reference.order=indexed"
        )
    if evaluate.probe and "probe" in evaluate.model_fields_set:
        raise ValueError(
            f"evaluate.probe = {evaluate.probe}: data.reference.order = stream knows no pairs before training, so "
            "that none can be held out; set evaluate.probe=0, or measure other pairs as evaluate.geometry"
        )


def _check_subset(target: TargetConfig, key: str) -> None:
    if target.has_prompts:
        origin = "data with text_column" if target.text_column is not None else f"{target.format} data"
        raise ValueError(f"{key}: {origin} has prompts and no classes to choose images of; remove it")
    if target.loader == "ffcv":
        raise ValueError(f"{key}: loader ffcv reads complete sets; use plain or dali, or prepare both parts")


def _check_held_out_set(key: str, evaluation: EvaluationSet, target: TargetConfig) -> None:
    """Validates that a set of the target's data measures exactly what the target holds out."""
    is_target = all(getattr(evaluation, name) == getattr(target, name) for name in ("path", "format", "split"))
    if evaluation.holdout is None:
        if is_target and target.holdout is not None:
            raise ValueError(
                f"{key} is the data of data.target, which trains on most of it: set {key}.holdout = "
                f"{target.holdout:g} to measure the part that is held out"
            )
        return
    if evaluation.dataset is not None or evaluation.task == "retrieval":
        raise ValueError(f"{key}.holdout: only labelled sets of your own have one; remove it")
    if not is_target:
        raise ValueError(
            f"{key}.holdout: the set must have the path, format and split of data.target, whose held-out part it "
            "measures"
        )
    if evaluation.holdout != target.holdout:
        share = "null" if target.holdout is None else f"{target.holdout:g}"
        raise ValueError(
            f"{key}.holdout = {evaluation.holdout:g}, but data.target.holdout = {share}: set both to the same "
            "share, otherwise the model is measured on images that it trains on"
        )


def _check_evaluation_set(key: str, evaluation: EvaluationSet) -> None:
    known, task, metric = evaluation.dataset is not None, evaluation.task, evaluation.metric
    if known and evaluation.format is not None:
        raise ValueError(f"{key}.format: the layout of a known dataset is detected; remove it")
    if not known and evaluation.format is None:
        raise ValueError(f"{key}.format is missing; or name a known data set as {key}.dataset")
    if known and evaluation.on_skipped != "error":
        raise ValueError(f"{key}.on_skipped: a known dataset is measured completely; remove it")
    _check_questions(key, evaluation)
    if task != "classification" and evaluation.classes != "all":
        raise ValueError(f"{key}.classes: {task} has no classes; remove it")
    if known and task != "classification":
        raise ValueError(f"{key}.task: a known dataset has its own; remove it")
    column = "label_column" if task == "retrieval" else "text_column"
    if getattr(evaluation, column) is not None:
        raise ValueError(f"{key}.{column}: {task} does not use it; remove it")
    if evaluation.holdout is not None and task == "vqa":
        raise ValueError(f"{key}.holdout: questions have none; remove it")
    if evaluation.format == "webdataset" and task == "classification" and evaluation.class_names is None:
        raise ValueError(f"{key}.class_names: webdataset data needs a text file of names")
    if metric is not None and not known and _task_of(metric) != task:
        raise ValueError(f"{key}.metric: {metric} is not a {task} metric")
    if metric == "worst_region" and not known:
        raise ValueError(f"{key}.metric: only a known dataset has regions")


def _task_of(metric: Metric) -> str:
    if metric == "soft_accuracy":
        return "vqa"
    return "retrieval" if "_to_" in metric else "classification"


def _check_questions(key: str, evaluation: EvaluationSet) -> None:
    """Validates the keys of questions, which go with ``format = vqa`` and ``task = vqa``."""
    if (evaluation.format == "vqa") != (evaluation.task == "vqa"):
        raise ValueError(f"{key}: format = vqa and task = vqa go together; set both or none")
    if evaluation.task != "vqa":
        for name in ("image_root", "annotations", "answers", "questions"):
            if getattr(evaluation, name) is not None:
                raise ValueError(f"{key}.{name}: only task = vqa has it; remove it")
        return
    if evaluation.answers is None:
        raise ValueError(
            f"{key}.answers is missing: the file of candidate answers; write it by dive-fast answers, from the "
            "training questions"
        )
    for name in ("class_names", "templates"):
        if getattr(evaluation, name) is not None:
            raise ValueError(f"{key}.{name}: vqa has no classes; remove it")
