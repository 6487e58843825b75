"""Models of open_clip as two towers: construction, weights, tokenizers, and features of images and texts."""

import contextlib
import copy
import logging
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from dive_fast.config.schema import DataConfig, ModelConfig
from dive_fast.data.batch import Text
from dive_fast.data.prompts import PooledAt
from dive_fast.data.text_tokenizer import Tokenizer, quick_bpe
from dive_fast.data.transforms import Preprocess
from dive_fast.errors import ConfigError, warn_on_main_rank
from dive_fast.io.atomic_files import atomic_path
from dive_fast.io.safe_read import forbid_code_execution
from dive_fast.kernels.naive import unit
from dive_fast.model import low_rank
from dive_fast.model.features import Features
from dive_fast.model.huggingface import import_model, siglip_tower
from dive_fast.model.huggingface.import_model import ForeignModel
from dive_fast.model.model_files import (
    PREPROCESS_KEYS,
    check_architecture,
    describe_foreign_file,
    describe_interpolation,
    read_description,
    summarize_preprocess,
    tensor_shapes,
    write_description,
)
from dive_fast.model.model_names import BRING_WEIGHTS, DESCRIPTION, LOCAL, SCHEME, check_name, full_name
from dive_fast.numerics import full_fp32

_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}
"""Autocast dtype of a ``precision``; None: no autocast."""

__all__ = ["Features", "Towers", "create", "tokenizer_of", "unit"]

TEXT_MULTIPLE = 8
"""On a GPU and in compiled towers, lengths of trimmed texts are multiples of this many tokens. Matrices whose
sides are multiples of 8 take the fast paths of tensor cores, and fewer shapes are fewer choices of kernels, sizes
of buffers and compilations. Tokens after the end of a text do not change its feature."""
HEAD = "head."
"""Prefix of the parameter names of a head."""
PROMPTS = "prompts."
"""Prefix of the parameter names of learned prompts."""
ADDED = (HEAD, PROMPTS)
"""Prefixes of parameters that are not the model's."""


class Towers(nn.Module):
    """Both towers and the logit scale of an open_clip model, with the parameter names of CustomTextCLIP.

    ``logit_scale`` (and a SigLIP's ``logit_bias``) has shape ``(1,)``, since DeepSpeed refuses parameters without
    dimensions; :meth:`export` restores open_clip's shape. The bias has no effect on a softmax loss and is not
    trained.
    """

    _causal_mask: Tensor | None

    def __init__(self, model: Any, layout: frozenset[str] | None = None) -> None:
        """Takes over the towers of ``model``.

        Args:
            model: an open_clip CustomTextCLIP (``force_custom_text=True``).
            layout: parameter names that :meth:`export` uses; default: those of ``model``.
        """
        super().__init__()
        self.visual: Any = model.visual
        self.text: Any = model.text
        self.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1).clone())
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = (
            None if bias is None else nn.Parameter(bias.detach().reshape(1).clone(), requires_grad=False)
        )
        self._layout = layout or frozenset(model.state_dict())
        self._scalar = model.logit_scale.shape
        self.pooled_at: PooledAt = _pooled_at(self.text)
        # Each call replaces the tower's mask by a part of this one; a buffer moves with the model.
        self.register_buffer("_causal_mask", getattr(self.text, "attn_mask", None), persistent=False)
        self.preprocess = Preprocess.of(self.visual)
        self.config: ModelConfig | None = None
        """The config passed to :func:`create`; None for towers created otherwise."""
        self.model_cfg: dict[str, Any] | None = None
        """open_clip's architecture; None for towers not built by :func:`create`."""
        self.feature_consistency: Any = None
        """The measurement of :mod:`dive_fast.engine.feature_consistency`; None before it."""
        self.is_made_consistent = False
        """Whether :func:`dive_fast.engine.feature_consistency.make_consistent` was called."""
        self.adapters: Any = None
        """The record of :mod:`dive_fast.model.adapters`; None for towers without adapters."""
        self.logit_scale_max: float | None = None
        """Upper bound of the logit scale; None: unbounded."""
        self.autocast: torch.dtype | None = None
        """Dtype of the matrix products of both towers; None: fp32."""
        self.text_multiple: int | None = None
        """Lengths of trimmed texts are multiples of this many tokens; None: of :data:`TEXT_MULTIPLE` for tokens on
        a GPU, otherwise of one."""
        self.head: nn.Linear | None = None
        """Classification head on unit image features, if the objective trains one; not exported with the model."""
        self.prompts: Any = None
        """The :class:`~dive_fast.model.learned_prompts.LearnedPrompts` that classify instead of hand-made ones, if
        there are any; not exported with the model."""

    def train(self, mode: bool = True) -> "Towers":
        """Sets the mode of all modules except BatchNorms, which always use their running statistics.

        With batch statistics, a feature would depend on other samples: a batch could not be split into
        micro-batches, and the tuned model would not start equal to the frozen one. Scales and shifts are trained.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def set_precision(self, precision: str) -> "Towers":
        """Sets the precision of both towers' matrix products, a value of ``train.precision``; returns itself."""
        self.autocast = _AUTOCAST[precision]
        return self

    def forward(self, images: Tensor, tokens: Tensor | None = None, length: int | None = None) -> Features:
        """Encodes images and distinct texts.

        Args:
            images: ``(B, 3, H, W)``.
            tokens: ``(U, context)`` int64; None skips the text tower.
            length: tokens of the longest text. A causal tower that reads its feature at the end of the text gets
                only these, which is exact; any other tower gets all tokens.
        """
        image = self.encode_image(images)
        text = None if tokens is None else self.encode_text(tokens, length)
        logits = None if self.head is None else self.head(unit(image))
        return Features(image, text, self.scale(), logits)

    def encode_image(self, images: Tensor) -> Tensor:
        """Unnormalised image features: ``(B, 3, H, W) -> (B, D)``."""
        with self._precision(images.device):
            features: Tensor = self.visual(images)
        return features

    def encode_text(self, tokens: Tensor, length: int | None = None) -> Tensor:
        """Unnormalised text features: ``(U, context) -> (U, D)``. Trims to ``length`` tokens if that is exact."""
        if self.pooled_at is not None and self._causal_mask is not None:
            if length is not None:
                multiple = self.text_multiple or (TEXT_MULTIPLE if tokens.is_cuda else 1)
                tokens = tokens[:, : math.ceil(length / multiple) * multiple]
            context = tokens.shape[1]
            # open_clip adds the mask to the attention scores without cropping it to the length of the text.
            self.text.attn_mask = self._causal_mask[:context, :context]
        with self._precision(tokens.device):
            features: Tensor = self.text(tokens)
        return features

    def encode_pairs(self, images: Tensor, text: Text) -> tuple[Tensor, Tensor]:
        """Unnormalised features of image-text pairs, ``(B, D)`` each."""
        features: Features = self(images, text.tokens, text.length)
        assert features.text is not None
        return features.image, features.text[text.index]

    @property
    def context_length(self) -> int | None:
        """Maximum tokens of a text; None if open_clip does not define it."""
        return int(getattr(self.text, "context_length", 0)) or None

    @property
    def vocabulary(self) -> int:
        """Number of different tokens of the text tower; 0 if open_clip does not define it."""
        return int(getattr(self.text, "vocab_size", 0))

    @property
    def width(self) -> int:
        """The embedding width D, determined by encoding an empty text."""
        context = int(getattr(self.text, "context_length", 77))
        with torch.no_grad():
            return int(self.encode_text(self.logit_scale.new_zeros(1, context, dtype=torch.long), 1).shape[1])

    def projections(self) -> tuple[Tensor, Tensor]:
        """The last linear map of each tower, image and text: ``(w, D)`` each, views of the parameters.

        That of an adapted layer is W0 + (alpha / r) B A.

        Raises:
            ConfigError: a tower does not end with a linear map.
        """
        return _last_map(self.visual, "image", self.config), _last_map(self.text, "text", self.config)

    def scale(self) -> Tensor:
        """The logit scale, ``(1,)``, bounded by ``logit_scale_max`` if that is set.

        The bound applies here and not to the parameter: DeepSpeed's master copy would undo a clamp in place.
        """
        if self.logit_scale_max is None:
            return self.logit_scale.exp()
        bounded: Tensor = _BoundedExp.apply(self.logit_scale, self.logit_scale_max)  # type: ignore[no-untyped-call]
        return bounded

    @contextlib.contextmanager
    def _precision(self, device: torch.device) -> Iterator[None]:
        # TF32 has only the ten mantissa bits of fp16, too few for a teacher in fp32.
        with (
            full_fp32(self.autocast is None),
            torch.autocast(device.type, self.autocast, enabled=self.autocast is not None),
        ):
            yield

    def export(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Converts a state dict of this module to the names and shapes of the original open_clip model.

        Adapters are merged into the weights.
        """
        exported = {}
        for name, tensor in self.plain_state(state).items():
            if name.startswith(ADDED):
                continue
            scalar = name in ("logit_scale", "logit_bias")
            exported[self.exported_name(name)] = tensor.reshape(self._scalar) if scalar else tensor
        missing = sorted(self._layout.symmetric_difference(exported))
        assert not missing, f"exported names differ from open_clip's: {missing[:5]}"
        return exported

    def plain_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of this module as that of the same towers without adapters, whose weights have them."""
        merged: dict[str, Tensor] = dict(state) if self.adapters is None else self.adapters.merge(state)
        return merged

    def load_exported(self, state: dict[str, Tensor]) -> "Towers":
        """Loads weights in the layout of :meth:`export`, into towers without adapters; returns itself."""
        assert self.adapters is None, "merged weights are loaded into towers without adapters"
        current = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(ADDED)}
        weights = {name: state[self.exported_name(name)].reshape(tensor.shape) for name, tensor in current.items()}
        # Exported weights lack only the parameters of a head and of prompts.
        missing, unexpected = self.load_state_dict(weights, strict=False)
        assert not unexpected
        assert all(name.startswith(ADDED) for name in missing)
        return self

    def exported_name(self, name: str) -> str:
        """The name of a parameter in the original open_clip model."""
        return name if name in self._layout else name.removeprefix("text.")


def _last_map(tower: Any, name: str, config: ModelConfig | None) -> Tensor:
    """The last linear map of a tower, ``(w, D)``, a view of its parameter unless that has adapters.

    Raises:
        ConfigError: the tower does not end with a linear map.
    """
    layer = _last_layer(tower)
    while (inner := _last_layer_of(layer)) is not None:
        layer = inner
    if isinstance(layer, nn.Module) and low_rank.is_adapted(layer):
        return low_rank.weight_of(layer).T
    if isinstance(layer, nn.Linear):
        return layer.weight.T
    if isinstance(layer, nn.Parameter) and layer.ndim == 2:
        return layer
    model = "this model" if config is None else config.name
    raise ConfigError(
        f"model.name: the {name} tower of {model} does not end with a linear map, on which this objective has a "
        "penalty; set the penalty's weight to 0, or take another model"
    )


def _last_layer(tower: Any) -> Any:
    """The layer or parameter that computes the feature of an open_clip tower; None where there is none."""
    if hasattr(tower, "trunk"):  # TimmModel: its own head, otherwise the classifier of timm's model
        return tower.head if len(tower.head) else tower.trunk.get_classifier()
    if hasattr(tower, "attnpool"):  # ModifiedResNet
        return tower.attnpool.c_proj
    # HFTextEncoder and VisionTransformer; TextTransformer
    return getattr(tower, "proj", getattr(tower, "text_projection", None))


def _last_layer_of(layer: Any) -> Any:
    """The last layer within an MLP or an attention pooling; None for other layers."""
    if isinstance(layer, nn.Sequential):
        return layer[-1] if len(layer) else None
    within = {"Mlp": "fc2", "AttentionPool2d": "proj", "RotAttentionPool2d": "proj"}  # timm's
    return getattr(layer, within[type(layer).__name__]) if type(layer).__name__ in within else None


class _BoundedExp(torch.autograd.Function):
    """``min(exp(x), bound)``, with gradient ``exp(x)`` up to and including the bound.

    Above the bound, the gradient is the bound where a descent lowers x, and 0 where it would raise x. So a model
    that starts there, or overshoots by a step, returns. The comparison uses logarithms: in fp32 exp(ln 100) is
    100.0000076 > 100, so comparing exponentials would freeze every model that starts at ln 100.

    Each call decides separately. Only above the bound, two halves or ranks with gradients of opposite signs
    therefore lower x slightly faster than their sum would.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:  # type: ignore[override]
        scale = x.exp().clamp(max=bound)
        ctx.save_for_backward(scale, x > max(math.log(bound), _fp32_log(bound)))
        return scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        scale, is_above = ctx.saved_tensors
        return torch.where(is_above & (gradient < 0), torch.zeros_like(gradient), gradient * scale), None


def _fp32_log(bound: float) -> float:
    """The logarithm of ``bound``, rounded to fp32 like a parameter."""
    return float(torch.tensor(math.log(bound), dtype=torch.float32))


def create(config: ModelConfig, weights: bool = True) -> Towers:
    """Builds a model with its pre-trained weights in fp32 on the CPU.

    The preprocessing is that of the weights, even if they are not loaded: from the pretrained tag, or from the
    ``open_clip_config.json`` in the folder or next to the file; otherwise open_clip's default, with a warning.

    Args:
        weights: whether to load the weights; false if others will be loaded, or if only shapes matter.

    Raises:
        ConfigError: the model or weights do not exist; the message names the key of ``model`` to change.
    """
    check(config, weights)
    name = full_name(config)
    load_weights = weights and not config.random
    pretrained = config.pretrained if load_weights else None
    preprocess_cfg, is_described = _preprocess_cfg(config, name)
    path = None if config.pretrained is None else Path(config.pretrained)
    foreign = _foreign(config, load_weights)
    try:
        with (
            forbid_code_execution(),
            contextlib.nullcontext() if load_weights else _without_warnings_about_random_weights(),
            _random_weights() if config.random else contextlib.nullcontext(),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "QuickGELU mismatch")  # _warn_about_weights reports it
            if foreign is None:
                siglip_tower.register(_timm_name(name))
                model = open_clip.create_model(
                    name,
                    pretrained,
                    precision="fp32",
                    force_custom_text=True,
                    force_preprocess_cfg=preprocess_cfg,
                    require_pretrained=load_weights,
                    load_weights=load_weights,
                    pretrained_text=load_weights,
                )
            else:
                model = foreign.build()
                if load_weights:
                    model.load_state_dict(foreign.weights(model))
    except Exception as error:  # torch, safetensors, pickle and transformers raise errors of many types
        description = describe_foreign_file(path) if path is not None and path.is_file() else None
        reason = _one_line(error) if description is None else f"it is {description}"
        raise ConfigError(f"model: cannot load {config.name} ({config.pretrained}): {reason}") from error
    if hasattr(model, "text_decoder"):
        raise ConfigError(f"model.name: {config.name} has a text decoder; only two-tower models can be tuned")
    model_cfg = open_clip.get_model_config(name) if foreign is None else copy.deepcopy(foreign.model_cfg)
    towers = Towers(model, _original_names(model_cfg or {}, frozenset(model.state_dict())))
    towers.logit_scale_max = config.logit_scale_max
    towers.config, towers.model_cfg = config, model_cfg
    if load_weights:
        current_scale = float(towers.logit_scale.detach().exp().max())
        if config.logit_scale_max is not None and current_scale > config.logit_scale_max * (1 + 1e-6):
            warn_on_main_rank(
                f"model.logit_scale_max = {config.logit_scale_max:g} is below the model's own logit scale, "
                f"{current_scale:.4g}: training begins at the bound"
            )
        _warn_about_weights(config, name, towers, is_described)
    return towers


def check(config: ModelConfig, weights: bool = True) -> None:
    """Validates the names of a model and its weights without loading anything.

    Args:
        weights: whether the weights will be loaded.

    Raises:
        ConfigError: the model or weights do not exist; the message names the closest ones.
    """
    name, pretrained = full_name(config), config.pretrained
    check_name(config, weights)
    if name.startswith(BRING_WEIGHTS):
        _foreign(config, weights and not config.random)
        return
    if not weights or config.random:
        return
    tags = open_clip.list_pretrained_tags_by_model(name)
    valid = f"open_clip has no weights of {name}"
    if tags:
        valid = f"the tags of {name} are {textwrap.shorten(', '.join(tags), 200, placeholder=' ...')}"
    if pretrained is None:
        raise ConfigError(
            f"model.pretrained is missing: name a tag or a file of weights ({valid}); model.random = true "
            "starts from random weights"
        )
    if not open_clip.is_pretrained_cfg(name, pretrained) and not Path(pretrained).is_file():
        raise ConfigError(
            f"model: cannot load {config.name} ({pretrained}): {pretrained} is no known tag or valid file path: "
            + valid
        )


def _foreign(config: ModelConfig, weights: bool) -> ForeignModel | None:
    """The description of a model in transformers' format; None for other models.

    Args:
        weights: whether the weights will be loaded.

    Raises:
        ConfigError: there is no such model, or open_clip has no counterpart.
    """
    if not config.name.startswith(SCHEME):
        return None
    try:
        return import_model.read(config.name, weights)
    except ValueError as error:
        raise ConfigError(f"model: cannot load {config.name}: {error}") from error


def _timm_name(name: str) -> str | None:
    """timm's name of the image tower in the description of a folder."""
    if not name.startswith(LOCAL):
        return None
    described = read_description(Path(name.removeprefix(LOCAL)))
    vision = {} if described is None else described.model_cfg.get("vision_cfg")
    return vision.get("timm_model_name") if isinstance(vision, Mapping) else None


def _preprocess_cfg(config: ModelConfig, name: str) -> tuple[dict[str, Any] | None, bool]:
    """The preprocessing that overrides open_clip's, if any, and whether a tag or a folder defines it."""
    if name.startswith(BRING_WEIGHTS) or config.pretrained is None:
        return None, name.startswith(BRING_WEIGHTS)
    if tag := open_clip.get_pretrained_cfg(name, config.pretrained):
        return {key: tag[key] for key in PREPROCESS_KEYS if tag.get(key) is not None}, True
    path = Path(config.pretrained)
    described = read_description(path.parent) if path.is_file() else None
    if described is None:
        return None, False
    check_architecture(described, name, open_clip.get_model_config(name))
    return dict(described.preprocess_cfg), True


def _warn_about_weights(config: ModelConfig, name: str, towers: Towers, is_described: bool) -> None:
    if not is_described:
        warn_on_main_rank(
            f"{config.pretrained}: no {DESCRIPTION} next to it, so images are preprocessed by open_clip's default "
            f"({summarize_preprocess(towers.preprocess)})"
        )
    if config.pretrained is None or name.startswith(BRING_WEIGHTS):
        return
    tag = open_clip.get_pretrained_cfg(name, config.pretrained)
    if not tag:
        shapes = tensor_shapes(Path(config.pretrained))
        if line := describe_interpolation(shapes, towers.export(towers.state_dict())):
            warn_on_main_rank(f"{config.pretrained}: {line}")
        return
    ours, theirs = bool((towers.model_cfg or {}).get("quick_gelu")), bool(tag.get("quick_gelu"))
    if ours != theirs:
        other = f"{name}-quickgelu" if theirs else name.removesuffix("-quickgelu")
        warn_on_main_rank(
            f"model.name: {name} computes {'with' if ours else 'without'} QuickGELU, the weights "
            f"{config.pretrained} were trained {'with' if theirs else 'without'} it; use model.name = {other}"
        )


@contextlib.contextmanager
def _random_weights() -> Iterator[None]:
    """Makes random weights equal in every command, run and rank, without a change of global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def read_weights(config: ModelConfig, path: Path) -> dict[str, Tensor]:
    """Reads any checkpoint that open_clip can load, in the layout of :meth:`Towers.load_exported`.

    Raises:
        ConfigError: the file cannot be read without executing code, or does not fit this model.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such checkpoint")
    foreign = _foreign(config, weights=False)
    try:
        with forbid_code_execution(), _without_warnings_about_random_weights():
            siglip_tower.register(_timm_name(full_name(config)))
            if foreign is None:
                model = open_clip.create_model(
                    full_name(config), None, precision="fp32", load_weights=False, pretrained_text=False
                )
            else:
                model = foreign.build(custom_text=False)
            open_clip.load_checkpoint(model, str(path))
    except Exception as error:  # errors of many types
        description = describe_foreign_file(path)
        reason = _one_line(error) if description is None else f"it is {description}"
        raise ConfigError(f"{path}: not weights of {config.name} that open_clip can load: {reason}") from error
    state: dict[str, Tensor] = model.state_dict()
    if line := describe_interpolation(tensor_shapes(path), state):
        warn_on_main_rank(f"{path}: {line}")
    return state


def tokenizer_of(config: ModelConfig, text_length: int | None = None) -> Tokenizer:
    """The tokenizer of a model: texts -> ``(len, context)`` int64.

    Args:
        text_length: context length; default: the model's.

    Raises:
        ConfigError: the tokenizer cannot be loaded.
    """
    foreign = _foreign(config, weights=False)
    try:
        with forbid_code_execution():
            tokenizer: Tokenizer = (
                open_clip.get_tokenizer(full_name(config), context_length=text_length)
                if foreign is None
                else foreign.tokenizer(text_length)
            )
    except Exception as error:  # errors of many types
        raise ConfigError(f"model.name: cannot load the tokenizer of {config.name}: {_one_line(error)}") from error
    return quick_bpe(tokenizer)  # type: ignore[no-any-return]


def _pooled_at(text: Any) -> PooledAt:
    """The token at which a text tower reads its feature if later tokens cannot change it, otherwise None."""
    causal = getattr(text, "attn_mask", None) is not None
    if not causal or getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False):
        return None
    pool: str = text.pool_type
    return "argmax" if pool == "argmax" else int(text.eos_id) if pool == "eos" else None


def _original_names(config: Mapping[str, Any], custom: frozenset[str]) -> frozenset[str]:
    """The parameter names of this model in open_clip without ``force_custom_text``."""
    text_config = config.get("text_cfg", {})
    if config.get("custom_text") or "hf_model_name" in text_config or "multimodal_cfg" in config:
        return custom
    return frozenset(key.removeprefix("text.") for key in custom)


@contextlib.contextmanager
def _without_warnings_about_random_weights() -> Iterator[None]:
    """Silences warnings about random weights for a model that is built without weights on purpose."""
    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _one_line(error: Exception) -> str:
    """The message of an error in one line, without advice to execute a file's code."""
    text = str(error)
    for advice in ("Weights only load failed. ", "Re-running `torch.load`", "(1) Re-running", "(1) In PyTorch"):
        before, separator, _ = text.partition(advice)
        if separator and before.strip():
            text = before
    text = textwrap.shorten(text, 300, placeholder=" ...") or type(error).__name__
    network_errors = ("Failed to download", "Failed initial config", "LocalEntryNotFound", "offline", "connection")
    if any(word in str(error) for word in network_errors):
        text += "; without a network, download the file elsewhere and name it as model.pretrained"
    return text


def save_description(towers: Towers, folder: Path) -> None:
    """Writes ``open_clip_config.json``, and a Hugging Face tokenizer if the model has one, into ``folder``."""
    if towers.config is None or towers.model_cfg is None:
        (folder / DESCRIPTION).unlink(missing_ok=True)
        return
    has_tokenizer = bool((towers.model_cfg.get("text_cfg") or {}).get("hf_tokenizer_name"))
    tokenizer = tokenizer_of(towers.config) if has_tokenizer else None
    write_description(folder, towers.model_cfg, towers.preprocess, tokenizer)


def save(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes weights atomically as safetensors."""
    from safetensors.torch import save_file

    with atomic_path(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial, metadata)


def check_text_length(data: DataConfig, towers: Towers) -> None:
    """Validates ``text_length`` of both halves against the context of the text tower.

    Raises:
        ConfigError: it exceeds the model's context, or the tower needs its complete context.
    """
    for half in ("target", "reference"):
        section = getattr(data, half)
        if section is None or section.text_length is None:
            continue
        context = int(getattr(towers.text, "context_length", section.text_length))
        if section.text_length > context:
            raise ConfigError(
                f"data.{half}.text_length = {section.text_length} exceeds the model's context of {context}"
            )
        if towers.pooled_at is None:
            name = "the model" if towers.config is None else towers.config.name
            raise ConfigError(f"data.{half}.text_length: the text tower of {name} needs its complete context")
