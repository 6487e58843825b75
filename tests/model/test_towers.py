"""Towers: features equal to open_clip's, weights that open_clip can load, and errors for invalid models."""

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dive_fast import numerics
from dive_fast.config.schema import ModelConfig
from dive_fast.data.prompts import pack
from dive_fast.data.transforms import Preprocess
from dive_fast.errors import ConfigError
from dive_fast.kernels import naive
from dive_fast.model.towers import Towers, _pooled_at, create, save, tokenizer_of, unit

OPENAI_AND_LAION = ["ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14", "ViT-L-14-quickgelu", "ViT-B-32"]
EOS, SIGLIP = "ViT-H-14-worldwide", "ViT-B-16-SigLIP"
MODELS = [*OPENAI_AND_LAION, EOS, SIGLIP]
TEXTS = ["a cat", "the photo of a dog", "a cat", "dog", "the photo of a dog", "a photo of the cat of the dog"]
SIGLIP_PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Folders of reduced models by name; open_clip knows each as ``small-<name>`` too."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: root / name for name in MODELS}
    for seed, (name, folder) in enumerate(folders.items()):
        config = tiny.reduced(name)
        if "hf_tokenizer_name" in config["text_cfg"]:
            tiny.write_tokenizer(folder)
            config["text_cfg"]["hf_tokenizer_name"] = str(folder)
        tiny.write_model(folder, config, seed, SIGLIP_PREPROCESS if name == SIGLIP else None)
        (root / f"small-{name}.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
        patch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
        open_clip.add_model_config(root)
        yield folders


def config_of(folder: Path) -> ModelConfig:
    return ModelConfig(name=f"local-dir:{folder}")


def images_for(towers: Towers, count: int = 6) -> Tensor:
    return torch.randn(count, 3, *towers.preprocess.size, generator=torch.Generator().manual_seed(1))


def towers_with(folder: Path, text: dict[str, Any], **model: Any) -> Towers:
    """A reduced ViT-B-32 with a text tower of another kind."""
    config = tiny.reduced("ViT-B-32")
    config["text_cfg"] |= text
    return create(ModelConfig(name=tiny.write_model(folder, config | model)))


def num_input_tokens(towers: Towers, tokens: Tensor, length: int) -> int:
    """The number of tokens per text that the tower receives."""
    seen = []
    hook = towers.text.token_embedding.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    with torch.no_grad():
        towers.encode_text(tokens, length)
    hook.remove()
    return int(seen[0])


# Features


@pytest.mark.parametrize("name", MODELS)
def test_features_equal_open_clip(models: dict[str, Path], name: str) -> None:
    config = config_of(models[name])
    towers, model = create(config).eval(), open_clip.create_model(config.name).eval()
    images, tokens = images_for(towers), tokenizer_of(config)(TEXTS)
    with torch.no_grad():
        assert torch.equal(towers.encode_image(images), model.encode_image(images))
        assert torch.equal(towers.encode_text(tokens), model.encode_text(tokens))
    assert torch.equal(towers.scale(), model.logit_scale.exp().reshape(1))
    assert all(parameter.dtype == torch.float32 for parameter in towers.parameters())


VISION, TEXT = tiny.VISION, tiny.TEXT
ODD: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "not square": (VISION | {"image_size": [32, 48]}, {}, {}),
    "attentional pool": (VISION | {"attentional_pool": True, "attn_pooler_heads": 2}, {}, {}),
    "average pool": (VISION | {"pool_type": "avg", "final_ln_after_pool": True}, {}, {}),
    "no pool, sinusoidal": (VISION | {"pos_embed_type": "sin_cos_2d", "no_ln_pre": True}, {}, {}),
    "read at eos": ({}, {"pool_type": "eos", "eos_id": 49407}, {}),
    "short context": ({}, {"context_length": 16}, {}),
    "long context": ({}, {"context_length": 300}, {}),
    "biased projection": ({}, {"proj_bias": True}, {}),
    "squashed": ({}, {}, {"mean": [0, 0, 0], "std": [1, 1, 1], "resize_mode": "squash"}),
    "random filter": ({}, {}, {"interpolation": "random"}),
    "with borders": (VISION | {"image_size": [48, 32]}, {}, {"resize_mode": "longest", "fill_color": 9}),
    "other size in the description": ({}, {}, {"size": 64, "interpolation": "bilinear"}),
    "resnet": ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}, {}, {}),
    "layer scale": (VISION | {"ls_init_value": 0.1}, {"ls_init_value": 0.1}, {}),
}
"""(vision_cfg, text_cfg, preprocess_cfg) of further kinds of models."""


@pytest.mark.parametrize("kind", ODD)
def test_features_and_views_of_odd_models_equal_open_clip(tmp_path: Path, kind: str) -> None:
    vision, text, preprocess = ODD[kind]
    config = {"embed_dim": 24, "vision_cfg": vision or VISION, "text_cfg": TEXT | text}
    config["custom_text"] = "proj_bias" in text  # open_clip's other class cannot be given its own weights
    name = tiny.write_model(tmp_path, config, 0, preprocess or None)
    towers = create(ModelConfig(name=name)).eval()
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokens = tokenizer_of(ModelConfig(name=name))(TEXTS)
    assert torch.equal(tokens, open_clip.get_tokenizer(name)(TEXTS))
    images = [Image.open(io.BytesIO(tiny.jpeg(seed, size=size))) for seed, size in enumerate([(60, 33), (33, 60)])]
    views = torch.stack([tiny.shown(towers.preprocess, image) for image in images])
    assert torch.equal(views, torch.stack([transform(image) for image in images]))
    with torch.no_grad():
        assert torch.equal(towers.encode_image(views), model.eval().encode_image(views))
        assert torch.equal(towers.encode_text(tokens), model.encode_text(tokens))
        length = pack(tokens, towers.pooled_at).length
        trimmed = towers.encode_text(tokens, length)
        assert torch.allclose(trimmed, model.encode_text(tokens), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_adamw_step_changes_every_weight(models: dict[str, Path], name: str) -> None:
    config = config_of(models[name])
    towers = create(config)
    before = {name: parameter.detach().clone() for name, parameter in towers.named_parameters()}
    optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-2, weight_decay=0.0)
    text = pack(tokenizer_of(config)(TEXTS), towers.pooled_at)
    image_features, text_features = towers.encode_pairs(images_for(towers), text)
    naive.contrastive_loss(image_features, text_features, towers.scale()).backward()
    optimizer.step()
    unchanged = {name for name, parameter in towers.named_parameters() if torch.equal(parameter, before[name])}
    # A SigLIP's bias does not affect a softmax loss.
    assert unchanged == ({"logit_bias"} if name == SIGLIP else set())


def test_siglip_has_the_preprocessing_of_its_config(models: dict[str, Path]) -> None:
    towers = create(config_of(models[SIGLIP]))
    assert towers.preprocess == Preprocess((160, 160), (0.5,) * 3, (0.5,) * 3, "bicubic", "squash")
    assert towers.logit_bias is not None
    assert towers.logit_bias.shape == (1,)
    assert not towers.logit_bias.requires_grad
    assert towers.logit_bias.item() == -10


@pytest.mark.parametrize("name", ["ViT-B-32", SIGLIP])
def test_encode_pairs_equals_encoding_each_text_separately(models: dict[str, Path], name: str) -> None:
    config = config_of(models[name])
    towers = create(config).double()
    tokens = tokenizer_of(config)(TEXTS)
    text = pack(tokens, towers.pooled_at)
    assert len(text.tokens) == 4
    with torch.no_grad():
        image_features, text_features = towers.encode_pairs(images_for(towers).double(), text)
        separate = torch.cat([towers.encode_text(row[None]) for row in tokens])
        assert torch.allclose(text_features, separate, rtol=1e-12, atol=1e-14)
        assert torch.equal(image_features, towers.encode_image(images_for(towers).double()))


# Trimming


@pytest.mark.parametrize(
    ("name", "pooled_at"), [("ViT-B-32-quickgelu", "argmax"), ("ViT-L-14", "argmax"), (EOS, 2)]
)
def test_trimming_is_exact_for_causal_towers(models: dict[str, Path], name: str, pooled_at: Any) -> None:
    config = config_of(models[name])
    towers, model = create(config).double(), open_clip.create_model(config.name).double()
    assert towers.pooled_at == pooled_at
    tokens = tokenizer_of(config)(TEXTS)
    length = pack(tokens, towers.pooled_at).length
    assert length < 15
    assert num_input_tokens(towers, tokens, length) == length
    # In fp64, since sums over 77 and over 15 keys round differently.
    gradients = {}
    for key, features in {
        "trimmed": lambda: towers.encode_text(tokens, length),
        "untrimmed": lambda: towers.encode_text(tokens),
        "trimmed again": lambda: towers.encode_text(tokens, length),
    }.items():
        towers.zero_grad()
        encoded = features()
        assert torch.allclose(encoded, model.encode_text(tokens), rtol=1e-12, atol=1e-14), key
        encoded.square().sum().backward()
        gradients[key] = {parameter: value.grad.clone() for parameter, value in towers.text.named_parameters()}
    for parameter, gradient in gradients["untrimmed"].items():
        for key in ("trimmed", "trimmed again"):
            assert torch.allclose(gradients[key][parameter], gradient, rtol=1e-10, atol=1e-13), (key, parameter)
    # One token less changes the longest text.
    with torch.no_grad():
        assert not torch.allclose(towers.encode_text(tokens, length - 1), model.encode_text(tokens), rtol=1e-3)


def test_trimming_keeps_a_text_that_fills_the_context(models: dict[str, Path]) -> None:
    config = config_of(models["ViT-B-32"])
    tokens = tokenizer_of(config)(["a cat", "cat " * 100])
    assert pack(tokens, "argmax").length == 77
    towers = create(config)
    assert num_input_tokens(towers, tokens, 77) == 77


@pytest.mark.parametrize(
    "text",
    [
        {"pool_type": "last"},
        {"pool_type": "first"},
        {"no_causal_mask": True},
        {"embed_cls": True},
        {"no_causal_mask": True, "pool_type": "last"},
    ],
)
def test_towers_with_other_pooling_are_not_trimmed(tmp_path: Path, text: dict[str, Any]) -> None:
    towers = towers_with(tmp_path, text, custom_text=True).double()
    assert towers.pooled_at is None
    tokens = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    assert pack(tokens, towers.pooled_at).length == 77
    assert num_input_tokens(towers, tokens, 12) == 77
    model = open_clip.create_model(f"local-dir:{tmp_path}").double()
    with torch.no_grad():
        assert torch.equal(towers.encode_text(tokens, 12), model.encode_text(tokens))


def test_towers_with_a_padding_mask_are_not_trimmed() -> None:
    # These towers have no causal mask in open_clip today; the result must not depend on that.
    tower = TextTransformer(no_causal_mask=True, use_pad_mask=True, width=32, heads=2, layers=1)
    assert _pooled_at(tower) is None
    tower.attn_mask = torch.zeros(77, 77)
    assert _pooled_at(tower) is None
    tower.use_pad_mask = False
    assert _pooled_at(tower) == "argmax"


def test_siglip_is_not_trimmed(models: dict[str, Path]) -> None:
    config = config_of(models[SIGLIP])
    towers, tokens = create(config), tokenizer_of(config)(TEXTS)
    assert towers.pooled_at is None
    assert tokens.shape == (6, 64)
    assert num_input_tokens(towers, tokens, 5) == 64


# Last linear maps


HF = {"hf_model_name": "", "hf_tokenizer_name": "", "hf_pooler_type": "cls_pooler"}
TIMM = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None, "image_size": 160}
MAPS: dict[str, tuple[dict[str, Any], dict[str, Any], int, tuple[int, int] | str]] = {
    "clip": (VISION, {}, 24, (32, 32)),
    "attentional pool": (VISION | {"attentional_pool": True, "attn_pooler_heads": 2}, {}, 24, (24, 32)),
    "average pool": (VISION | {"pool_type": "avg", "final_ln_after_pool": True}, {}, 24, (32, 32)),
    "biased text projection": (VISION, {"proj_bias": True}, 24, (32, 32)),
    "resnet": ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}, {}, 24, (256, 32)),
    "eva": (TIMM, {}, 24, (64, 32)),
    "timm, linear": (TIMM | {"timm_proj": "linear", "timm_pool": "avg"}, {}, 24, (64, 32)),
    "timm, pool and classifier": (TIMM | {"timm_pool": "map"}, {}, 24, (64, 32)),
    "convnext, mlp": (
        TIMM | {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp"},
        {},
        24,
        (48, 32),
    ),
    "convnext": (TIMM | {"timm_model_name": "test_convnext", "timm_pool": "avg"}, {}, 24, (64, 32)),
    "timm, attention pool": (
        TIMM | {"timm_model_name": "test_byobnet", "timm_pool": "abs_attn", "timm_proj": ""},
        *({}, 24, (256, 32)),
    ),
    "timm, rotary attention pool": (
        TIMM | {"timm_model_name": "test_byobnet", "timm_pool": "rot_attn", "timm_proj": ""},
        *({}, 24, (256, 32)),
    ),
    "siglip": (TIMM | {"timm_pool": "map", "timm_proj": "none"}, {"proj_bias": True}, 64, "image"),
    "timm, no classifier": (TIMM | {"timm_proj": "none"}, {}, 64, "image"),
    "text without projection": (VISION, {"proj_type": "none", "width": 24}, 24, "text"),
    "transformers, linear": (VISION, HF | {"hf_proj_type": "linear"}, 24, (32, 16)),
    "transformers, mlp": (VISION, HF | {"hf_proj_type": "mlp"}, 24, (32, 20)),
    "transformers, equal width": (VISION, HF | {"hf_proj_type": None}, 16, "text"),
}
"""(vision_cfg, text_cfg, D, widths of both maps or the tower that has none) of kinds of models."""


def write_bert(folder: Path) -> str:
    """The config of a small text tower of transformers."""
    folder.mkdir()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = {"model_type": "roberta", "vocab_size": len(tiny.VOCABULARY), "pad_token_id": 0, **sizes}
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    tiny.write_tokenizer(folder)
    return str(folder)


def towers_of_kind(folder: Path, kind: str) -> Towers:
    vision, text, width, _ = MAPS[kind]
    if "hf_model_name" in text:
        bert = write_bert(folder / "bert")
        text = text | {"hf_model_name": bert, "hf_tokenizer_name": bert, "context_length": 16}
    else:
        text = TEXT | {"vocab_size": 100} | text
    config = {"embed_dim": width, "vision_cfg": vision, "text_cfg": text, "custom_text": True}
    return create(ModelConfig(name=tiny.write_model(folder / "model", config))).eval()


@pytest.mark.parametrize("kind", MAPS)
def test_projections_are_the_last_linear_maps(tmp_path: Path, kind: str) -> None:
    towers, (_, _, width, expected) = towers_of_kind(tmp_path, kind), MAPS[kind]
    if isinstance(expected, str):
        with pytest.raises(
            ConfigError, match=f"the {expected} tower of local-dir.* does not end with a linear map"
        ):
            towers.projections()
        return
    maps = towers.projections()
    assert [tuple(each.shape) for each in maps] == [(width_of_tower, width) for width_of_tower in expected]
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, *towers.preprocess.size, generator=generator)
    # With the end token of the vocabulary last.
    tokens = torch.randint(3, 9, (3, 16), generator=generator)
    tokens[:, 8] = len(tiny.VOCABULARY) - 1
    encoders = (lambda: towers.encode_image(images)), (lambda: towers.encode_text(tokens))
    with torch.no_grad():
        for last, encode in zip(maps, encoders, strict=True):
            before, value = encode(), last.clone()
            last.zero_()
            bias = encode()
            last.copy_(2 * value)
            doubled = encode()
            last.copy_(value)
            assert not torch.allclose(before, before[:1].expand_as(before))
            assert torch.equal(bias, bias[:1].expand_as(bias))
            assert torch.allclose(doubled - bias, 2 * (before - bias), rtol=1e-4, atol=1e-5)
    assert all(each.requires_grad for each in maps)


# Scale, normalisation, precision


LN_100 = 4.605170249938965
"""Logit scale of the released RN50x4 and ViT-L-14: ln 100 in fp32, whose exponential exceeds 100."""


@pytest.mark.parametrize("bound", [None, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logit_scale_and_its_gradient(models: dict[str, Path], bound: float | None, dtype: torch.dtype) -> None:
    config = config_of(models["ViT-B-32"]).model_copy(update={"logit_scale_max": bound})
    towers = create(config).to(dtype)
    assert towers.logit_scale.shape == (1,)
    for value in (math.log(50.0), math.log(99.9), math.log(100.0), LN_100, math.log(101.0), math.log(1e4)):
        for pushes_up in (True, False):
            towers.logit_scale.data.fill_(value)
            towers.zero_grad()
            scale = towers.scale()
            (-scale if pushes_up else scale).sum().backward()
            free = math.exp(towers.logit_scale.item())
            expected = free if bound is None else min(free, bound)
            assert scale.shape == (1,)
            assert scale.item() == pytest.approx(expected, rel=1e-6)
            assert bound is None or scale.item() <= bound
            is_above = bound is not None and free > bound * (1 + 1e-6)
            gradient = 0.0 if is_above and pushes_up else expected
            assert towers.logit_scale.grad is not None
            assert abs(towers.logit_scale.grad.item()) == pytest.approx(gradient, rel=1e-6)
            assert towers.logit_scale.item() == pytest.approx(value)  # the parameter is unchanged


@pytest.mark.parametrize("bound", [None, 100.0])
def test_logit_scale_trains_from_ln_100(models: dict[str, Path], bound: float | None) -> None:
    towers = create(config_of(models["ViT-B-32"]).model_copy(update={"logit_scale_max": bound}))
    optimizer = torch.optim.AdamW([towers.logit_scale], lr=1e-3, weight_decay=0.0)
    for start, target, limit in [(LN_100, 90.0, 0.999), (math.log(101.0), 90.0, 0.999), (LN_100, 1e3, 1.001)]:
        towers.logit_scale.data.fill_(start)
        for _ in range(4):
            optimizer.zero_grad()
            (towers.scale() - target).square().sum().backward()
            optimizer.step()
        # Decreases from the bound and above it; increases only without a bound, or by the momentum of a step.
        ratio = towers.logit_scale.exp().item() / math.exp(start)
        assert ratio < limit if limit < 1 else ratio > limit or bound is not None, (start, target)
        assert ratio != 1.0
        optimizer.state.clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unit_normalises_in_at_least_fp32(dtype: torch.dtype) -> None:
    features = torch.randn(20, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    rows = unit(features)
    assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = features.double() / features.double().norm(dim=1, keepdim=True)
    assert torch.allclose(rows.double(), expected, rtol=0, atol=1e-15 if dtype == torch.float64 else 1e-7)
    assert torch.equal(unit(torch.zeros(1, 3)), torch.zeros(1, 3))


def test_autocast_changes_features_but_not_weights(
    models: dict[str, Path],
) -> None:
    config = config_of(models["ViT-B-32"])
    towers, frozen = create(config).eval(), create(config).eval()
    images, tokens = images_for(towers), tokenizer_of(config)(TEXTS)
    with torch.no_grad():
        expected = frozen(images, tokens, 12)
        for dtype, tolerance in [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)]:
            towers.autocast = dtype
            # A teacher in fp32 runs next to a student under autocast.
            with torch.autocast("cpu", dtype):
                teacher = frozen(images, tokens, 12)
            student = towers(images, tokens, 12)
            for low, full, reference in zip(student[:2], teacher[:2], expected[:2], strict=True):
                assert low.dtype == dtype
                assert full.dtype == torch.float32
                assert torch.equal(full, reference)
                error = (unit(low) - unit(reference)).norm(dim=1).max()
                assert 1e-6 < error < tolerance
            assert student.logit_scale.dtype == torch.float32
        towers.autocast = None
        assert torch.equal(towers(images, tokens, 12).image, expected.image)
    assert {parameter.dtype for parameter in towers.parameters()} == {torch.float32}


# Numerics and exported weights


@pytest.fixture
def switches() -> Iterator[None]:
    """Restores PyTorch's defaults for other tests."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("name", ["matmul", "cudnn"])
def test_fp32_towers_disable_tf32(models: dict[str, Path], name: str) -> None:
    backend = torch.backends.cuda.matmul if name == "matmul" else torch.backends.cudnn
    towers = create(config_of(next(iter(models.values()))))
    seen: list[bool] = []
    towers.visual.register_forward_hook(lambda *_: seen.append(backend.allow_tf32))
    for chosen in (True, False):
        backend.allow_tf32 = chosen
        for autocast in (None, torch.bfloat16):
            towers.autocast = autocast
            towers.encode_image(images_for(towers))
            assert backend.allow_tf32 is chosen  # unchanged outside the towers
    assert seen == [False, True, False, False]


@pytest.mark.usefixtures("switches")
def test_configure_overrides_earlier_precision_settings() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    assert all(numerics.state().values())
    numerics.configure()
    assert numerics.state() == dict.fromkeys(numerics.state(), False)
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
    json.dumps(numerics.state())


@pytest.mark.parametrize("name", MODELS)
def test_exported_weights_load_in_open_clip_with_equal_features(
    models: dict[str, Path], name: str, tmp_path: Path
) -> None:
    towers = create(config_of(models[name])).eval()
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    path = tmp_path / "model.safetensors"
    save(towers.export(towers.state_dict()), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]

    model = open_clip.create_model(f"small-{name}", pretrained=str(path)).eval()
    # Names and shapes are those of open_clip's class, so load_state_dict accepts them.
    assert {key: value.shape for key, value in load_file(path).items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert type(model).__name__ == ("CustomTextCLIP" if name == SIGLIP else "CLIP")
    images, tokens = images_for(towers), tokenizer_of(config_of(models[name]))(TEXTS)
    with torch.no_grad():
        assert torch.equal(model.encode_image(images), towers.encode_image(images))
        assert torch.equal(model.encode_text(tokens), towers.encode_text(tokens))
    assert torch.equal(model.logit_scale.reshape(1), towers.logit_scale)
    if name == SIGLIP:
        assert torch.equal(model.logit_bias.reshape(1), towers.logit_bias)

    # And back again: as the weights of a named model, and into existing towers.
    for loaded in (
        create(ModelConfig(name=f"small-{name}", pretrained=str(path))),
        create(config_of(models[name])).load_exported(load_file(path)),
    ):
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, towers.state_dict()[key]), key


def test_export_keeps_a_nonscalar_logit_scale(tmp_path: Path) -> None:
    towers = towers_with(tmp_path, {}, nonscalar_logit_scale=True)
    model = open_clip.create_model(f"local-dir:{tmp_path}")
    model.load_state_dict(towers.export(towers.state_dict()))
    assert model.logit_scale.shape == (1,)


def test_random_model_is_reproducible_and_silent(
    models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    drawn = torch.rand(1)
    for config in (
        ModelConfig(name="small-ViT-B-32", random=True),
        config_of(models["ViT-B-32"]).model_copy(update={"random": True}),
    ):
        torch.manual_seed(1)
        first = create(config)
        assert torch.equal(torch.rand(1), drawn)  # the global random state is unchanged
        torch.manual_seed(2)
        second = create(config)
        assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
        assert not torch.equal(first.visual.proj, create(config_of(models["ViT-B-32"])).visual.proj)
    assert caplog.records == []


# Errors


def error_of(config: ModelConfig, make: Any = create) -> str:
    with pytest.raises(ConfigError) as caught:
        make(config)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def broken_model(folder: Path, config: Any = None, **weights: bytes) -> ModelConfig:
    folder.mkdir()
    text = config if isinstance(config, str) else json.dumps({"model_cfg": tiny.CLIP | (config or {})})
    (folder / "open_clip_config.json").write_text(text)
    for name, content in weights.items():
        (folder / f"open_clip_{name.replace('_', '.')}").write_bytes(content)
    return config_of(folder)


def test_create_rejects_unknown_models_with_a_hint() -> None:
    for name, near in [
        ("ViT-B/16", "; did you mean ViT-B-16?"),
        ("ViT-L/14@336px", "; did you mean ViT-L-14-336?"),
        ("vit-b-32", "; did you mean ViT-B-32?"),
        ("openai", "; see open_clip.list_models()"),
        ("s3:ViT-B-32", "; did you mean ViT-B-32?"),
    ]:
        for weights in (True, False):
            message = error_of(ModelConfig(name=name), lambda config, weights=weights: create(config, weights))
            assert message == f"model.name: open_clip has no model {name}{near}"


def test_create_rejects_missing_or_superfluous_pretrained(models: dict[str, Path], tmp_path: Path) -> None:
    message = error_of(ModelConfig(name="ViT-B-16-quickgelu"))
    assert message.startswith(
        "model.pretrained is missing: name a tag or a file of weights (the tags of ViT-B-16-"
    )
    assert "openai" in message
    assert message.endswith("); model.random = true starts from random weights")
    assert "(open_clip has no weights of small-ViT-B-32)" in error_of(ModelConfig(name="small-ViT-B-32"))
    assert "the tags of ViT-B-32-quickgelu are openai, " in error_of(
        ModelConfig(name="ViT-B-32-quickgelu", pretrained="open-ai")
    )
    for name in (config_of(models["ViT-B-32"]).name, "demo"):
        message = error_of(ModelConfig(name=name, pretrained="openai"))
        assert message.startswith(f"model.pretrained: {name} brings its own weights; remove it")
    with pytest.raises(ValueError, match=r"model.random = true starts .*, model.pretrained names others"):
        ModelConfig(name="ViT-B-32", pretrained="openai", random=True)


def test_create_rejects_missing_weights(models: dict[str, Path], tmp_path: Path) -> None:
    message = error_of(ModelConfig(name="small-ViT-B-32", pretrained=str(tmp_path / "missing.pt")))
    assert message.startswith(f"model: cannot load small-ViT-B-32 ({tmp_path}/missing.pt): ")
    assert "missing.pt is no known tag or valid file path: open_clip has no weights of small-ViT" in message
    # A tag that would be downloaded, without a network.
    message = error_of(ModelConfig(name="ViT-B-32-quickgelu", pretrained="openai"))
    assert message.startswith(
        "model: cannot load ViT-B-32-quickgelu (openai): Failed to download weights for tag "
    )
    assert message.endswith("; without a network, download the file elsewhere and name it as model.pretrained")
    message = error_of(ModelConfig(name="hf-hub:nobody/nothing"))
    assert message.startswith("model: cannot load hf-hub:nobody/nothing (None): ")
    assert error_of(config_of(tmp_path / "nowhere")).endswith(f"not found: {tmp_path}/nowhere")
    # A folder without weights must not become a random model.
    message = error_of(broken_model(tmp_path / "weightless"))
    assert "could not be loaded" in message


def test_create_rejects_unreadable_weights_and_configs(models: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.ones(1)}, other)
    for number, config in enumerate(
        [
            broken_model(tmp_path / "a", model_safetensors=b"not safe"),
            broken_model(tmp_path / "b", pytorch_model_bin=b"not a pickle"),
            broken_model(tmp_path / "c", "{"),
            broken_model(tmp_path / "d", "{}"),
            broken_model(tmp_path / "e", {"depth": 3}),
            broken_model(tmp_path / "f", json.dumps({"model_cfg": {"embed_dim": 3}})),
            broken_model(tmp_path / "g", {"vision_cfg": {"timm_model_name": "nosuch"}}),
            ModelConfig(name="small-ViT-B-32", pretrained=str(other)),
        ]
    ):
        message = error_of(config)
        assert message.startswith(f"model: cannot load {config.name} ({config.pretrained}): "), number
        assert not message.endswith(": "), number


def test_create_rejects_a_text_decoder(tmp_path: Path) -> None:
    name = tiny.write_model(tmp_path, tiny.reduced("coca_ViT-B-32"))
    message = error_of(ModelConfig(name=name))
    assert message == f"model.name: {name} has a text decoder; only two-tower models can be tuned"


# Tokenizers


def test_tokenizer_is_the_models_and_truncates_to_text_length(models: dict[str, Path]) -> None:
    tokenizer = tokenizer_of(config_of(models["ViT-B-32"]))
    assert torch.equal(tokenizer(TEXTS), open_clip.tokenize(TEXTS))
    short = tokenizer_of(config_of(models["ViT-B-32"]), text_length=6)
    assert short(TEXTS).shape == (6, 6)
    # Truncated texts end with the end-of-text token, where features are read.
    assert set(short(TEXTS).amax(1).tolist()) == {49407}
    words = tokenizer_of(config_of(models[SIGLIP]), text_length=5)(["A cat!", "the photo of a dog"])
    ids = tiny.VOCABULARY
    assert words.tolist() == [
        [ids["a"], ids["cat"], ids["</s>"], ids["<pad>"], ids["<pad>"]],
        [ids["the"], ids["photo"], ids["of"], ids["a"], ids["</s>"]],
    ]


def test_tokenizer_of_rejects_missing_tokenizers(tmp_path: Path) -> None:
    broken = broken_model(tmp_path / "a", {"text_cfg": {"hf_tokenizer_name": "nobody/nothing"}})
    for config in (
        ModelConfig(name="ViT-B-16-SigLIP"),
        ModelConfig(name="hf-hub:nobody/nothing"),
        config_of(tmp_path / "nowhere"),
        broken,
        broken_model(tmp_path / "b", "{"),
    ):
        message = error_of(config, tokenizer_of)
        assert message.startswith(f"model.name: cannot load the tokenizer of {config.name}: ")


def test_short_context_gives_the_features_of_truncated_texts(models: dict[str, Path]) -> None:
    config = config_of(models["ViT-B-32"])
    towers = create(config).double()
    tokens = tokenizer_of(config, text_length=5)(TEXTS)
    with torch.no_grad():
        padded = F.pad(tokens, (0, 72))
        assert torch.allclose(towers.encode_text(tokens), towers.encode_text(padded), rtol=1e-12, atol=1e-14)
