"""Models by name, with weights; and methods with and without a reference set."""

from pathlib import Path

import open_clip
import pytest

from dive_fast.config.schema import ObjectiveConfig
from dive_fast.errors import ConfigError
from dive_fast.methods import registry
from dive_fast.quickstart.choose_method import KNOWN, WITH_REFERENCE, WITHOUT_REFERENCE, choose_method
from dive_fast.quickstart.choose_model import DEFAULT_MODEL, DEFAULT_TAG, ModelChoice, choose_model


@pytest.mark.parametrize(
    ("name", "pretrained", "expected"),
    [
        (None, None, ("ViT-B-16-quickgelu", "openai")),
        ("ViT-B-16", None, ("ViT-B-16-quickgelu", "openai")),
        ("vit-b/16", None, ("ViT-B-16-quickgelu", "openai")),
        ("ViT-L-14", None, ("ViT-L-14-quickgelu", "openai")),
        ("ViT-H-14", None, ("ViT-H-14", "laion2b_s32b_b79k")),
        ("ViT-B-16", "laion2b_s34b_b88k", ("ViT-B-16", "laion2b_s34b_b88k")),
        ("ViT-B-16-SigLIP", None, ("ViT-B-16-SigLIP", "webli")),
        ("demo", None, ("demo", None)),
        ("hf-hub:owner/model", None, ("hf-hub:owner/model", None)),
        ("hf:openai/clip-vit-base-patch32", None, ("hf:openai/clip-vit-base-patch32", None)),
    ],
)
def test_choose_model(name: str | None, pretrained: str | None, expected: tuple[str, str | None]) -> None:
    assert choose_model(name, pretrained) == ModelChoice(*expected)


def test_every_model_with_weights_has_a_tag_of_its_activation() -> None:
    models = open_clip.list_models()
    for name in {name for name, _ in open_clip.list_pretrained()} & set(models):
        chosen = choose_model(name)
        assert chosen.pretrained is not None
        config = open_clip.get_pretrained_cfg(chosen.name, chosen.pretrained)
        assert config, name
        is_quick = bool((open_clip.get_model_config(chosen.name) or {}).get("quick_gelu"))
        if f"{chosen.name}-quickgelu" in models or chosen.name.endswith("-quickgelu"):
            assert is_quick == bool(config.get("quick_gelu")), name


def test_default_model_is_known_to_open_clip() -> None:
    assert DEFAULT_TAG in open_clip.list_pretrained_tags_by_model(DEFAULT_MODEL)


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-61", None, "--model ViT-B-61: open_clip has no such model; did you mean ViT-B-16?"),
        ("openai/clip", None, "repository of the Hugging Face Hub is named hf-hub:openai/clip"),
        ("ViT-B-16", "opnai", "--pretrained opnai: neither a file nor a tag of ViT-B-16 "),
        ("demo", "openai", "--pretrained openai: demo brings its weights; remove it"),
        ("local-dir:nowhere", None, "nowhere has no open_clip_config.json"),
        ("ViT-S-16", None, "open_clip has no weights for it: name a file of weights by --pretrained"),
    ],
)
def test_choose_model_refuses(name: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_model(name, pretrained)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_choose_model_accepts_a_file_of_weights(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"")
    assert choose_model("ViT-S-16", str(tmp_path / "x.pt")) == ("ViT-S-16", str(tmp_path / "x.pt"))


@pytest.mark.parametrize("name", [None, *registry.table().presets])
def test_choose_method_by_need_of_a_reference(name: str | None) -> None:
    for has_reference in (True, False):
        chosen = name or (WITH_REFERENCE if has_reference else WITHOUT_REFERENCE)
        needs = registry.needs(ObjectiveConfig(name=chosen))
        assert KNOWN.get(chosen, needs.reference) == needs.reference
        if needs.reference == has_reference:
            assert choose_method(name, has_reference) == chosen
        else:
            with pytest.raises(ConfigError, match="--reference"):
                choose_method(name, has_reference)


def test_known_methods_need_no_classes() -> None:
    for name in KNOWN:
        assert not registry.needs(ObjectiveConfig(name=name)).classes


@pytest.mark.parametrize(
    ("name", "message"),
    [("div", "--method div: no such method .* did you mean dive"), ("starft", "--method starft needs classes")],
)
def test_choose_method_refuses(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_method(name, False, has_classes=False)
