"""An open_clip model as two towers: images and texts -> features; text trimmed and encoded once per prompt."""

import contextlib
import logging
import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor, nn

from dive_fast.config import ConfigError, ModelConfig
from dive_fast.data.batch import Text
from dive_fast.data.prompts import PooledAt, Tokenizer, quick_bpe
from dive_fast.data.views import Preprocess
from dive_fast.files import whole_path
from dive_fast.kernels.naive import unit
from dive_fast.untrusted import nothing_executed

__all__ = ["Features", "Towers", "create", "tokenizer_of", "unit"]

BRING_WEIGHTS = ("hf-hub:", "local-dir:")
HEAD = "head."
"""What the names of the head's parameters begin with."""
LOGIT_SCALE_MAX = 100.0
"""CLIP clamps the logit scale here: its logarithm at ln 100."""


class Features(NamedTuple):
    """What the towers make of a batch; features are un-normalised."""

    image: Tensor
    """``(B, D)``"""
    text: Tensor | None
    """``(U, D)``, a row for each distinct text; ``text[index]`` has a row for each pair. None without texts."""
    logit_scale: Tensor
    """``(1,)``: s = 1 / tau itself, at most 100."""
    logits: Tensor | None = None
    """``(B, C)``, of the classification head on unit image features; None without one."""


class Towers(nn.Module):
    """Both towers and the logit scale of an open_clip model, under the names of open_clip's CustomTextCLIP.

    ``logit_scale`` (and a SigLIP's ``logit_bias``) has shape ``(1,)``, since DeepSpeed refuses parameters without
    dimensions; :meth:`export` gives it back as open_clip has it. The bias plays no part in a softmax loss and
    stays as it is.
    """

    _causal_mask: Tensor | None

    def __init__(self, model: Any, layout: frozenset[str] | None = None) -> None:
        """Takes the towers over from ``model``.

        Args:
            model: an open_clip CustomTextCLIP (``force_custom_text=True``).
            layout: the parameter names that :meth:`export` shall use; default: the model's own.
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
        # Each call puts a part of it in the place of the tower's own mask; a buffer moves with the model.
        self.register_buffer("_causal_mask", getattr(self.text, "attn_mask", None), persistent=False)
        self.preprocess = Preprocess.of(self.visual)
        self.autocast: torch.dtype | None = None
        """Precision of both towers' matrix products; None: fp32."""
        self.text_multiple = 1
        """Trimmed texts have so many tokens or a multiple."""
        self.head: nn.Linear | None = None
        """Classifies unit image features, where an objective trains such a head; no part of the exported model."""

    def forward(self, images: Tensor, tokens: Tensor | None = None, length: int | None = None) -> Features:
        """Encodes images and distinct texts.

        Args:
            images: ``(B, 3, H, W)``.
            tokens: ``(U, context)`` int64; None leaves the text tower out.
            length: tokens of the longest text. A causal tower that reads its feature at the end of the text gets
                only these, which is exact; any other tower gets all.
        """
        image = self.encode_image(images)
        text = None if tokens is None else self.encode_text(tokens, length)
        logits = None if self.head is None else self.head(unit(image))
        return Features(image, text, self.scale(), logits)

    def encode_image(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W) -> (B, D)``, un-normalised."""
        with self._precision(images.device):
            features: Tensor = self.visual(images)
        return features

    def encode_text(self, tokens: Tensor, length: int | None = None) -> Tensor:
        """``(U, context) -> (U, D)``, un-normalised; trimmed to ``length`` where that is exact."""
        if self.pooled_at is not None and self._causal_mask is not None:
            if length is not None:
                tokens = tokens[:, : math.ceil(length / self.text_multiple) * self.text_multiple]
            context = tokens.shape[1]
            # open_clip adds its whole mask to the attention scores whatever the length of the text.
            self.text.attn_mask = self._causal_mask[:context, :context]
        with self._precision(tokens.device):
            features: Tensor = self.text(tokens)
        return features

    def encode_pairs(self, images: Tensor, text: Text) -> tuple[Tensor, Tensor]:
        """Features of both halves of each pair, ``(B, D)`` each, un-normalised."""
        features: Features = self(images, text.tokens, text.length)
        assert features.text is not None
        return features.image, features.text[text.index]

    @property
    def width(self) -> int:
        """D, the embedding width, by encoding an empty text."""
        context = int(getattr(self.text, "context_length", 77))
        with torch.no_grad():
            return int(self.encode_text(self.logit_scale.new_zeros(1, context, dtype=torch.long)).shape[1])

    def scale(self) -> Tensor:
        """``(1,)``: the logit scale, clamped here: DeepSpeed's master would undo a clamp in place."""
        return self.logit_scale.exp().clamp(max=LOGIT_SCALE_MAX)

    @contextlib.contextmanager
    def _precision(self, device: torch.device) -> Iterator[None]:
        # In fp32 cuDNN's convolutions have TF32 by default, fp16's ten bits, which a teacher must not have.
        tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = tf32 and self.autocast is not None
        try:
            with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
                yield
        finally:
            torch.backends.cudnn.allow_tf32 = tf32

    def export(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of this module, as open_clip's ``load_state_dict`` of the original model wants it."""
        exported = {}
        for name, tensor in state.items():
            if name.startswith(HEAD):
                continue
            scalar = name in ("logit_scale", "logit_bias")
            exported[self.exported_name(name)] = tensor.reshape(self._scalar) if scalar else tensor
        missing = sorted(self._layout.symmetric_difference(exported))
        assert not missing, f"exported names differ from open_clip's: {missing[:5]}"
        return exported

    def load_exported(self, state: dict[str, Tensor]) -> "Towers":
        """Takes weights as :meth:`export` gives them; returns itself."""
        own = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(HEAD)}
        taken = {name: state[self.exported_name(name)].reshape(tensor.shape) for name, tensor in own.items()}
        # What was exported lacks a head's parameters and no others.
        missing, unexpected = self.load_state_dict(taken, strict=False)
        assert not unexpected
        assert all(name.startswith(HEAD) for name in missing)
        return self

    def exported_name(self, name: str) -> str:
        """What open_clip's original model calls a parameter of this module."""
        return name if name in self._layout else name.removeprefix("text.")


def create(config: ModelConfig, weights: bool = True) -> Towers:
    """Builds the model with its pre-trained weights, in fp32, on the CPU.

    Args:
        weights: false builds it at random, where its shapes alone matter, and loads nothing.

    Raises:
        ConfigError: no such model or weights; says which part of ``model`` to change.
    """
    name = _name(config)
    brings_weights = name.startswith(BRING_WEIGHTS)
    if not brings_weights and name not in open_clip.list_models():
        raise ConfigError(f"model.name: open_clip has no model {name}; see open_clip.list_models()")
    random = not weights or (config.pretrained is None and not brings_weights)
    pretrained = config.pretrained if weights else None
    try:
        with nothing_executed(), _without_warnings_about_random_weights() if random else contextlib.nullcontext():
            model = open_clip.create_model(
                name,
                pretrained,
                precision="fp32",
                force_custom_text=True,
                require_pretrained=not random,
                load_weights=weights,
                pretrained_text=weights,
            )
    except Exception as error:  # torch, safetensors, pickle and transformers each have errors of their own
        raise ConfigError(f"model: cannot load {config.name} ({config.pretrained}): {_one_line(error)}") from error
    if hasattr(model, "text_decoder"):
        raise ConfigError(f"model.name: {config.name} has a text decoder; only two-tower models can be tuned")
    return Towers(model, _original_names(name, frozenset(model.state_dict())))


def read_weights(config: ModelConfig, path: Path) -> dict[str, Tensor]:
    """A checkpoint that open_clip's ``load_checkpoint`` reads, as :meth:`Towers.load_exported` wants it.

    Raises:
        ConfigError: it cannot be read without executing what is in it, or is not of this model.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such checkpoint")
    try:
        with nothing_executed(), _without_warnings_about_random_weights():
            model = open_clip.create_model(
                _name(config), None, precision="fp32", load_weights=False, pretrained_text=False
            )
            open_clip.load_checkpoint(model, str(path))
    except Exception as error:  # as above
        why = _one_line(error)
        raise ConfigError(f"{path}: not weights of {config.name} that open_clip can load: {why}") from error
    state: dict[str, Tensor] = model.state_dict()
    return state


def tokenizer_of(config: ModelConfig, text_length: int | None = None) -> Tokenizer:
    """The model's own tokenizer: texts -> ``(len, context)`` int64.

    Args:
        text_length: context length, if not the model's.

    Raises:
        ConfigError: the tokenizer cannot be loaded.
    """
    try:
        with nothing_executed():
            tokenizer: Tokenizer = open_clip.get_tokenizer(_name(config), context_length=text_length)
    except Exception as error:  # as above
        raise ConfigError(f"model.name: cannot load the tokenizer of {config.name}: {_one_line(error)}") from error
    return quick_bpe(tokenizer)  # type: ignore[no-any-return]


def _name(config: ModelConfig) -> str:
    if config.name != "demo":
        return config.name
    from dive_fast.demo.world import MODEL_DIR  # the demo is no part of the engine: only when asked for

    return f"local-dir:{MODEL_DIR}"


def architecture(config: ModelConfig) -> dict[str, Any]:
    """open_clip's configuration of a model's towers, wherever it lies; empty where open_clip knows none.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        found = open_clip.get_model_config(_name(config))
    except Exception as error:  # of the file, of JSON, of the hub's client
        raise ConfigError(
            f"model.name: cannot read the configuration of {config.name}: {_one_line(error)}"
        ) from error
    return dict(found or {})


def _pooled_at(text: Any) -> PooledAt:
    """Where the feature is read, if what stands behind it cannot change it; else None."""
    causal = getattr(text, "attn_mask", None) is not None
    if not causal or getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False):
        return None
    pool: str = text.pool_type
    return "argmax" if pool == "argmax" else int(text.eos_id) if pool == "eos" else None


def _original_names(name: str, custom: frozenset[str]) -> frozenset[str]:
    """The parameter names that open_clip gives this model when it is not asked for a CustomTextCLIP."""
    config = open_clip.get_model_config(name) or {}
    text_config = config.get("text_cfg", {})
    if config.get("custom_text") or "hf_model_name" in text_config or "multimodal_cfg" in config:
        return custom
    return frozenset(key.removeprefix("text.") for key in custom)


@contextlib.contextmanager
def _without_warnings_about_random_weights() -> Iterator[None]:
    """A model asked for without weights (``pretrained: null``) is random on purpose."""
    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def save(state: dict[str, Tensor], path: Path) -> None:
    """Writes weights as safetensors, whole or not at all."""
    from safetensors.torch import save_file

    with whole_path(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial)
