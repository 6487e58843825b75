"""Architectures: the config of a CLIPModel or SiglipModel of transformers as open_clip's, and the reverse.

A field that has no counterpart is an error that names it; nothing is approximated.
"""

from collections.abc import Mapping
from typing import Any

from dive_fast.model.huggingface.siglip_tower import ACTIVATIONS, ImageTower, ratio
from dive_fast.model.model_files import architecture_differences

FAMILIES = {"clip": "CLIPModel", "siglip": "SiglipModel"}
"""Classes of transformers by their ``model_type``."""
_EPSILON = 1e-5
"""Epsilon of open_clip's layer norms where nothing is said."""
_LEGACY_EOS = 2
"""The ``eos_token_id`` with which transformers' CLIP reads the text feature at the largest token id."""
_TOKENIZER_KEYS = ("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode")
"""Keys of open_clip's ``text_cfg`` that describe the tokenizer and not the text tower."""


def parse(tree: Mapping[str, Any]) -> Any:
    """The config object of transformers for the contents of a ``config.json``.

    Raises:
        ValueError: it is not a CLIPModel or SiglipModel, or has invalid values.
    """
    import transformers

    family = tree.get("model_type")
    if family == "siglip2":
        raise ValueError(
            "model_type = siglip2: images of any size (NaFlex) with masked patches, unlike open_clip; SigLIP 2 of "
            "a fixed size, such as google/siglip2-base-patch16-224, is of the type siglip"
        )
    if family not in FAMILIES:
        raise ValueError(f"model_type = {family!r} is not one of {', '.join(FAMILIES)} (CLIPModel, SiglipModel)")
    if tree.get("quantization_config"):
        raise ValueError("quantization_config: quantized weights cannot be tuned; use the original ones")
    kind = getattr(transformers, FAMILIES[family].replace("Model", "Config"))
    try:
        return kind.from_dict(dict(tree))
    except Exception as error:  # its validation raises errors of many types
        raise ValueError(f"config.json: {' '.join(str(error).split())[:300]}") from error


def open_clip_config(config: Any) -> dict[str, Any]:
    """open_clip's architecture for a config of :func:`parse`.

    Raises:
        ValueError: a field has no counterpart.
    """
    vision, text = config.vision_config, config.text_config
    for name, section in (("vision_config", vision), ("text_config", text)):
        _check_section(name, section)
    if vision.num_channels != 3:
        raise ValueError(f"vision_config.num_channels = {vision.num_channels}: images here have 3")
    for key in ("image_size", "patch_size"):
        if not isinstance(getattr(vision, key), int):
            raise ValueError(f"vision_config.{key} = {getattr(vision, key)} is not one number")
    return _clip(config) if config.model_type == "clip" else _siglip(config)


def _check_section(name: str, section: Any) -> None:
    if section.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"{name}.hidden_act = {section.hidden_act} is not one of {', '.join(ACTIVATIONS)}, which open_clip has"
        )
    for key in ("attention_dropout", "dropout"):
        if getattr(section, key, 0.0):
            raise ValueError(
                f"{name}.{key} = {getattr(section, key)}: the towers of open_clip have no dropout; set 0"
            )
    if section.hidden_size % section.num_attention_heads:
        raise ValueError(
            f"{name}.hidden_size = {section.hidden_size} is not a multiple of its "
            f"{section.num_attention_heads} attention heads"
        )


def _clip(config: Any) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    if (vision.hidden_act == "quick_gelu") != (text.hidden_act == "quick_gelu"):
        raise ValueError(
            f"vision_config.hidden_act = {vision.hidden_act} and text_config.hidden_act = {text.hidden_act}: "
            "open_clip has QuickGELU in both towers or in none"
        )
    vision_cfg = {
        "image_size": vision.image_size,
        "layers": vision.num_hidden_layers,
        "width": vision.hidden_size,
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "patch_size": vision.patch_size,
        **_common(vision, _EPSILON),
    }
    text_cfg = _text(text) | _common(text, _EPSILON) | _pooling(text.eos_token_id)
    return _sections(config.projection_dim, text, vision_cfg, text_cfg)


def _siglip(config: Any) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    if not vision.vision_use_head:
        raise ValueError(
            "vision_config.vision_use_head = false: without its pooling, the model has no image feature"
        )
    if text.projection_size != vision.hidden_size:
        raise ValueError(
            f"text_config.projection_size = {text.projection_size} differs from vision_config.hidden_size = "
            f"{vision.hidden_size}, the size of image features"
        )
    tower = ImageTower(
        vision.image_size,
        vision.patch_size,
        vision.hidden_size,
        vision.num_hidden_layers,
        vision.num_attention_heads,
        vision.intermediate_size,
        vision.hidden_act,
        vision.layer_norm_eps,
    )
    vision_cfg = {
        "image_size": vision.image_size,
        "timm_model_name": tower.name,
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    pooling = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    text_cfg = _text(text) | _common(text, _EPSILON) | pooling
    return _sections(vision.hidden_size, text, vision_cfg, text_cfg) | {
        "init_logit_bias": -10,
        "custom_text": True,
    }


def _sections(width: int, text: Any, vision_cfg: dict[str, Any], text_cfg: dict[str, Any]) -> dict[str, Any]:
    quick = {"quick_gelu": True} if text.hidden_act == "quick_gelu" else {}
    return {"embed_dim": width, **quick, "vision_cfg": vision_cfg, "text_cfg": text_cfg}


def _text(text: Any) -> dict[str, Any]:
    return {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
    }


def _common(section: Any, epsilon: float) -> dict[str, Any]:
    """The keys of a tower that differ from open_clip's defaults."""
    mlp_ratio = ratio(section.intermediate_size, section.hidden_size)
    return {
        **({} if mlp_ratio == 4 else {"mlp_ratio": mlp_ratio}),
        **({} if section.layer_norm_eps == epsilon else {"norm_kwargs": {"eps": section.layer_norm_eps}}),
        **({"act_kwargs": {"approximate": "tanh"}} if section.hidden_act == "gelu_pytorch_tanh" else {}),
    }


def _pooling(eos: Any) -> dict[str, Any]:
    """The token at which the text feature is read, by transformers' rule."""
    if isinstance(eos, bool) or not isinstance(eos, int):
        raise ValueError(f"text_config.eos_token_id = {eos} is not one token")
    return {} if eos == _LEGACY_EOS else {"pool_type": "eos", "eos_id": eos}


def transformers_config(model_cfg: Mapping[str, Any], tower: ImageTower | None) -> Any:
    """The config of transformers for an architecture of open_clip.

    Args:
        model_cfg: open_clip's architecture.
        tower: the image tower, if it is a timm model.

    Raises:
        ValueError: transformers has no such model; the message names a field.
    """
    import transformers

    vision, text = model_cfg["vision_cfg"], dict(model_cfg["text_cfg"])
    if text.get("hf_model_name"):
        raise ValueError(f"text_cfg.hf_model_name = {text['hf_model_name']}: the text tower is another model")
    if "multimodal_cfg" in model_cfg:
        raise ValueError("multimodal_cfg: the model has a text decoder")
    quick = bool(model_cfg.get("quick_gelu"))
    if tower is not None:
        config = transformers.SiglipConfig(
            vision_config=_their_tower(tower), text_config=_their_text(text, quick, model_cfg["embed_dim"])
        )
    elif vision.get("timm_model_name"):
        raise ValueError(f"vision_cfg.timm_model_name = {vision['timm_model_name']}: not SigLIP's image tower")
    else:
        text_config = _their_text(text, quick, None) | {"eos_token_id": _their_eos(text)}
        config = transformers.CLIPConfig(
            vision_config=_their_vision(vision, quick),
            text_config=text_config,
            projection_dim=model_cfg["embed_dim"],
        )
    config.architectures = [FAMILIES[config.model_type]]
    _check_equal(model_cfg, config)
    return config


def _their_vision(vision: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    layers, width, head_width = vision.get("layers", 12), vision.get("width", 768), vision.get("head_width", 64)
    if not isinstance(layers, int):
        raise ValueError(
            f"vision_cfg.layers = {layers}: the image tower is a ResNet, and transformers' CLIP has a ViT"
        )
    image_size, patch_size = vision.get("image_size", 224), vision.get("patch_size", 16)
    if not isinstance(image_size, int) and len(set(image_size)) == 1:
        image_size = image_size[0]
    for key, value in (("image_size", image_size), ("patch_size", patch_size)):
        if not isinstance(value, int):
            raise ValueError(f"vision_cfg.{key} = {value} is not one number, as transformers' CLIP needs")
    return {
        "hidden_size": width,
        "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
        "num_hidden_layers": layers,
        "num_attention_heads": width // head_width,
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_act": _activation(vision, quick),
        "layer_norm_eps": _epsilon(vision),
    }


def _their_tower(tower: ImageTower) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "hidden_act": tower.activation,
        "layer_norm_eps": tower.epsilon,
    }


def _their_text(text: Mapping[str, Any], quick: bool, projection: int | None) -> dict[str, Any]:
    """The text section; ``projection`` is that of SigLIP."""
    width, vocabulary = text.get("width", 512), text.get("vocab_size", 49408)
    # Defaults of transformers that no model reads, and that are no tokens of other tokenizers.
    unused = ("bos_token_id",) if projection is None else ("bos_token_id", "eos_token_id")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": int(width * text.get("mlp_ratio", 4.0)),
        "num_hidden_layers": text.get("layers", 12),
        "num_attention_heads": text.get("heads", 8),
        "max_position_embeddings": text.get("context_length", 77),
        "hidden_act": _activation(text, quick),
        "layer_norm_eps": _epsilon(text),
        **({} if projection is None else {"projection_size": projection}),
        **({} if vocabulary == 49408 else dict.fromkeys(unused)),
    }


def _their_eos(text: Mapping[str, Any]) -> int:
    pool, eos = text.get("pool_type", "argmax"), text.get("eos_id", 2)
    if pool == "eos" and eos == _LEGACY_EOS:
        raise ValueError(
            "text_cfg.eos_id = 2: for this number, transformers' CLIP reads the largest token id instead"
        )
    if pool not in ("argmax", "eos"):
        raise ValueError(
            f"text_cfg.pool_type = {pool}: transformers' CLIP reads its text feature at the end token"
        )
    return int(eos) if pool == "eos" else _LEGACY_EOS


def _activation(section: Mapping[str, Any], quick: bool) -> str:
    arguments = dict(section.get("act_kwargs") or {})
    names: dict[Any, str] = {None: "gelu", "none": "gelu", "tanh": "gelu_pytorch_tanh"}
    approximate = arguments.pop("approximate", None)
    if arguments or approximate not in names or (quick and approximate is not None):
        raise ValueError(f"act_kwargs = {section['act_kwargs']} has no counterpart")
    return "quick_gelu" if quick else names[approximate]


def _epsilon(section: Mapping[str, Any]) -> float:
    return float((section.get("norm_kwargs") or {}).get("eps", _EPSILON))


def _check_equal(model_cfg: Mapping[str, Any], config: Any) -> None:
    """Checks that the config describes the same architecture when it is read again.

    Raises:
        ValueError: it does not; the message names the fields that transformers cannot express.
    """
    again = open_clip_config(config)
    differences = list(architecture_differences(_comparable(model_cfg), _comparable(again)))
    if differences:
        names = [line.partition(" there, ")[0] for line in differences[:4]]
        raise ValueError(f"transformers has no counterpart of {', '.join(names)}")


def _comparable(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture with one notation for what can be written in several."""
    vision, text = dict(model_cfg["vision_cfg"]), dict(model_cfg["text_cfg"])
    if "timm_model_name" in vision:  # SigLIP's; every size, also of its MLPs, was read from the tower
        vision = {key: vision[key] for key in ("timm_pool", "timm_proj") if key in vision}
    for section, width in ((vision, 768), (text, 512)):
        if "mlp_ratio" in section:
            width = section.get("width", width)
            section["mlp_ratio"] = ratio(int(width * section["mlp_ratio"]), width)
        section["norm_kwargs"] = {"eps": _epsilon(section), **(section.get("norm_kwargs") or {})}
        section["act_kwargs"] = section.get("act_kwargs") or None
        if isinstance(section.get("image_size"), list | tuple):
            section["image_size"] = section["image_size"][0]
    for key in (*_TOKENIZER_KEYS, "pad_id", *(() if text.get("pool_type") == "eos" else ("eos_id",))):
        text.pop(key, None)
    sections = {"vision_cfg": vision, "text_cfg": text}
    # Not under the name of open_clip, whose value is not compared.
    return {**model_cfg, **sections, "logit_bias": model_cfg.get("init_logit_bias") is not None}
