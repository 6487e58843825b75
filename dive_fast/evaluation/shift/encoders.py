"""Encoders whose features shift is measured in: the towers of a model, and unimodal references of other packages.

The references are those of FRAMES-VQA: an image transformer of timm, of which z is the mean of all tokens of the
last layer, and a text model of transformers, of which z is the mean of the last layer over unpadded tokens.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from dive_fast.data.prompts import pack, warn_once
from dive_fast.data.text_tokenizer import TOKENIZER_PROBES, Tokenizer
from dive_fast.data.transforms import Preprocess
from dive_fast.errors import ConfigError
from dive_fast.evaluation.feature_identity import computed_by, features_identity, structure
from dive_fast.evaluation.geometry.embed import in_fp32
from dive_fast.identity import Identity, digest
from dive_fast.model.huggingface.hub_files import folder_of, read_config
from dive_fast.model.model_identity import state_digest, weights_digest
from dive_fast.model.model_names import LOCAL
from dive_fast.model.towers import Towers
from dive_fast.numerics import full_fp32

Half = Literal["image", "text"]
POOLING = {"image": "mean of all tokens of the last layer", "text": "mean of the last layer over unpadded tokens"}
"""Pooling of the unimodal encoders."""
MAX_TOKENS = 1 << 20
"""Larger maximum lengths are those that tokenizers of transformers have if none is known."""


class Encoder(Protocol):
    """Embeds images, texts, or both, in fp32."""

    widths: Mapping[Half, int]
    """Width of the features of each half that the encoder embeds."""
    is_joint: bool
    """Whether images and texts are embedded in the same space."""

    @property
    def preprocess(self) -> Preprocess:
        """The preprocessing of images."""

    @property
    def digest(self) -> str:
        """A digest of the weights."""

    def identity(self, device: torch.device) -> Identity:
        """Everything that determines the features of a sample."""

    def embedding(self) -> AbstractContextManager[None]:
        """The context in which samples are embedded."""

    def images(self, images: Tensor) -> Tensor:
        """Features ``(B, h)`` of preprocessed images ``(B, 3, H, W)`` on the device of the model."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features ``(B, h)`` of texts."""


class TowersEncoder:
    """The towers of a model, which may get other weights between two sets."""

    is_joint = True

    def __init__(self, towers: Towers, tokenizer: Tokenizer) -> None:
        self._towers, self._tokenizer = towers, tokenizer
        width = towers.width
        self.widths: Mapping[Half, int] = {"image": width, "text": width}

    @property
    def preprocess(self) -> Preprocess:
        """The preprocessing of the model."""
        return self._towers.preprocess

    @property
    def digest(self) -> str:
        """The digest of the weights, as in the rows of ``dive-fast evaluate``."""
        return weights_digest(self._towers)

    def identity(self, device: torch.device) -> Identity:
        """The identity of the model's features."""
        return features_identity(self._towers, self._tokenizer, device)

    def embedding(self) -> AbstractContextManager[None]:
        """Evaluation mode without autocast; both are restored."""
        return in_fp32(self._towers)

    def images(self, images: Tensor) -> Tensor:
        """Unnormalised image features ``(B, D)``."""
        return self._towers.encode_image(images)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unnormalised text features ``(B, D)``; equal texts are encoded once."""
        text = pack(self._tokenizer(list(texts)), self._towers.pooled_at).to(self._towers.logit_scale.device)
        return self._towers.encode_text(text.tokens, text.length)[text.index]


@dataclass(frozen=True)
class CentralCrop(Preprocess):
    """timm's evaluation view: the central part of an image whose shorter side is resized to more than the view."""

    crop_share: float = 1.0
    """Share of the resized shorter side that the view has."""

    @cached_property
    def _evaluation(self) -> Any:
        return Compose(
            [Resize(self._resized, InterpolationMode(self.interpolation)), CenterCrop(self.size), _as_rgb]
        )

    @property
    def _resized(self) -> int:
        return math.floor(self.size[0] / self.crop_share)

    def _shortest(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = size
        if width <= height:
            return int(self._resized * height / width), self._resized
        return self._resized, int(self._resized * width / height)


def _as_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


class UnimodalEncoder:
    """An image encoder, a text encoder, or both, each with a space of its own."""

    is_joint = False

    def __init__(self, image: "ImageEncoder | None", text: "TextEncoder | None") -> None:
        self._image, self._text = image, text
        encoders: dict[Half, ImageEncoder | TextEncoder | None] = {"image": image, "text": text}
        self._encoders = {half: encoder for half, encoder in encoders.items() if encoder is not None}
        self.widths: Mapping[Half, int] = {half: encoder.width for half, encoder in self._encoders.items()}

    @property
    def preprocess(self) -> Preprocess:
        """The preprocessing of the image encoder."""
        assert self._image is not None
        return self._image.preprocess

    @property
    def names(self) -> str:
        """Names of the encoders, as they were passed."""
        return " and ".join(encoder.name for encoder in self._encoders.values())

    @cached_property
    def digest(self) -> str:
        """The digest of the weights of all encoders."""
        return digest([encoder.weights for encoder in self._encoders.values()])

    def identity(self, device: torch.device) -> Identity:
        """Weights, structure, preprocessing, tokenizer and pooling of each encoder; packages and the device."""
        return {"unimodal": {half: encoder.identity for half, encoder in self._encoders.items()}} | computed_by(
            device
        )

    def to(self, device: torch.device) -> "UnimodalEncoder":
        """Moves the models to a device; returns itself."""
        for encoder in self._encoders.values():
            encoder.model.to(device)
        return self

    def embedding(self) -> AbstractContextManager[None]:
        """Nothing: the encoders are in evaluation mode and in fp32."""
        return nullcontext()

    def images(self, images: Tensor) -> Tensor:
        """Features of the image encoder, ``(B, h)``."""
        assert self._image is not None
        return self._image(images)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features of the text encoder, ``(B, h)``."""
        assert self._text is not None
        return self._text(texts)


class ImageEncoder:
    """An image transformer of timm in fp32, with the mean of all tokens of its last layer as feature."""

    def __init__(self, name: str) -> None:
        """Builds the model.

        Args:
            name: a folder in timm's layout, timm's name of a model, or ``hf-hub:owner/repo``.

        Raises:
            ConfigError: it does not exist or cannot be loaded, or its last layer has no tokens.
        """
        self.name = name
        self.model, self.preprocess = _timm_model(name)
        self.weights = state_digest({f"image.{key}": value for key, value in self.model.state_dict().items()})
        with torch.no_grad():
            try:
                tokens = self._tokens(torch.zeros(1, 3, *self.preprocess.size))
            except Exception as error:  # layers raise errors of many types
                raise ConfigError(
                    f"--image-encoder {name}: it does not encode an image: {_line(error)}"
                ) from error
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ConfigError(
                f"--image-encoder {name}: its last layer has no tokens, (B, tokens, h), but {shape}: name an "
                " image transformer, such as vit_base_patch16_224.augreg_in21k"
            )
        self.width = tokens.shape[2]

    @property
    def identity(self) -> Identity:
        """Everything that determines the features of an image, without packages and device."""
        return {
            "weights": self.weights,
            "structure": structure(self.model),
            "preprocess": repr(self.preprocess),
            "pooling": POOLING["image"],
        }

    def _tokens(self, images: Tensor) -> Any:
        with full_fp32():
            return self.model.forward_features(images)

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``(B, h)`` of preprocessed images ``(B, 3, H, W)``."""
        features: Tensor = self._tokens(images).mean(1)
        return features


class TextEncoder:
    """A text model of transformers in fp32, with the mean of its last layer over unpadded tokens as feature."""

    def __init__(self, name: str) -> None:
        """Builds the model.

        Args:
            name: a folder in transformers' layout, or a hub id such as ``google-bert/bert-base-uncased``.

        Raises:
            ConfigError: it does not exist or cannot be loaded, or is not a model of texts.
        """
        self.name = name
        self.model, self._tokenizer, self.weights = _transformers_model(name)
        self._max_length = self._longest()
        with torch.no_grad():
            try:
                self.width = self(["a text", "a longer text"]).shape[1]
                self._tokens = [self._tokenize([probe])["input_ids"].tolist() for probe in TOKENIZER_PROBES]
            except Exception as error:  # models of other inputs raise errors of many types
                raise ConfigError(
                    f"--text-encoder {name}: it does not encode a text: {_line(error)}; name a text model, "
                    "such as google-bert/bert-base-uncased"
                ) from error

    @property
    def identity(self) -> Identity:
        """Everything that determines the features of a text, without packages and device."""
        return {
            "weights": self.weights,
            "structure": [type(self.model).__name__, _config_digest(self.model.config)],
            "tokenizer": digest(self._tokens),
            "max_length": self._max_length,
            "pooling": POOLING["text"],
        }

    def _longest(self) -> int | None:
        """The number of tokens at which texts are cut; None: they are not."""
        positions = getattr(self.model.config, "max_position_embeddings", None) or MAX_TOKENS
        length = min(int(self._tokenizer.model_max_length), int(positions))
        return length if length < MAX_TOKENS else None

    def _tokenize(self, texts: Sequence[str]) -> Any:
        return self._tokenizer(
            list(texts),
            padding=True,
            truncation=self._max_length is not None,
            max_length=self._max_length,
            return_tensors="pt",
        )

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Features ``(B, h)`` of texts."""
        tokens = self._tokenize(texts).to(next(self.model.parameters()).device)
        mask = tokens["attention_mask"][:, :, None]
        if self._max_length is not None and mask.shape[1] == self._max_length:
            warn_once(f"--text-encoder {self.name}: texts of more than {self._max_length} tokens are cut")
        with full_fp32():
            rows = self.model(**tokens).last_hidden_state
        features: Tensor = (rows * mask).sum(1) / mask.sum(1).clamp(min=1)
        return features


def _timm_model(name: str) -> tuple[Any, Preprocess]:
    import timm

    folder = Path(name.removeprefix(LOCAL)).expanduser()
    is_local = folder.is_dir()
    if not is_local and (name.startswith((LOCAL, "/", ".", "~")) or folder.exists()):
        raise ConfigError(f"--image-encoder {name}: no such folder")
    if is_local and not (folder / "config.json").is_file():
        raise ConfigError(
            f"--image-encoder {name}: it has no config.json: name a folder written by timm.models.save_for_hf, "
            "or one of the hub"
        )
    try:
        model = timm.create_model(f"{LOCAL}{folder}" if is_local else name, pretrained=True, num_classes=0)
    except Exception as error:  # timm, torch and the hub's client raise errors of many types
        hint = "" if is_local else "; without a connection, name a folder"
        raise ConfigError(f"--image-encoder {name}: timm cannot load it: {_line(error)}{hint}") from error
    return model.float().eval().requires_grad_(requires_grad=False), _timm_preprocess(name, model)


def _timm_preprocess(name: str, model: nn.Module) -> Preprocess:
    from timm.data.config import resolve_data_config

    config = resolve_data_config(model=model)
    channels, height, width = config["input_size"]
    mode, kind = config["crop_mode"], config["interpolation"]
    if channels != 3 or height != width or mode not in ("center", "squash") or kind not in ("bicubic", "bilinear"):
        raise ConfigError(
            f"--image-encoder {name}: its preprocessing is not supported: {channels} channels, {height} x {width} "
            f"pixels, {kind}, crop mode {mode}"
        )
    colours = tuple(config["mean"]), tuple(config["std"])
    if mode == "squash":
        return Preprocess((height, width), *colours, kind, "squash")
    return CentralCrop((height, width), *colours, kind, "shortest", crop_share=float(config["crop_pct"]))


def _transformers_model(name: str) -> tuple[Any, Any, str]:
    """The model, its tokenizer, and a digest of the weights that were loaded."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("--text-encoder needs transformers: pip install 'dive_fast[train]'") from error
    try:
        folder = folder_of(name, weights=True)
        read_config(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="right")
        with _quiet(transformers.utils.logging):
            model, loading = transformers.AutoModel.from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # transformers, torch and the hub's client raise errors of many types
        raise ConfigError(f"--text-encoder {name}: transformers cannot load it: {_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(f"--text-encoder {name}: its tokenizer has no token for padding")
    # A pooler follows the last layer: many checkpoints lack it, and transformers would draw it at random.
    missing = set(loading["missing_keys"])
    if lost := sorted(key for key in missing if "pooler" not in key):
        raise ConfigError(
            f"--text-encoder {name}: its weights lack {len(lost)} tensors of the model, the first is {lost[0]}"
        )
    state = {f"text.{key}": value for key, value in model.state_dict().items() if key not in missing}
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    return model.eval().requires_grad_(requires_grad=False), tokenizer, state_digest(state)


def _config_digest(config: Any) -> str:
    """A digest of a model's config; the attributes of its modules contain the path."""
    ignored = ("_name_or_path", "transformers_version", "dtype", "architectures")
    return digest(
        {
            key: value
            for key, value in json.loads(config.to_json_string(use_diff=False)).items()
            if key not in ignored
        }
    )


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Hides progress bars and the report about weights, which names heads that are not used."""
    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()


def _line(error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return first.strip()[:300]
