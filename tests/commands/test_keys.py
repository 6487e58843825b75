"""``dive-fast keys`` lists sections, keys, methods and words; the list of methods is that of the registry."""

import json

import pytest

from dive_fast.commands import keys
from dive_fast.commands.console import COMMANDS
from dive_fast.config.schema import Config, TrainConfig
from dive_fast.config.section import sections
from dive_fast.methods import method_list, registry
from dive_fast.projections import rules as projections


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The dotted keys that the command lists."""
    assert keys.main([*arguments, "--json"]) == 0
    return [entry["key"] for entry in json.loads(capsys.readouterr().out)]


def test_keys_without_methods_name_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert keys.main(["train"]) == 0
    printed = capsys.readouterr().out
    assert "train.learning_rate = 1e-05  [number]\n      Peak learning rate." in printed
    assert printed.endswith(f"\n{keys.OPTIONS}\n")
    assert "`" not in printed


def test_method_list_is_the_registry() -> None:
    remedy = "run: python -m dive_fast.methods.method_list"
    assert method_list.read() == method_list.from_registry(), remedy


def test_projections_and_their_options_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys, "digrap") == [
        *("projection.name=digrap", "projection.mu", "projection.cosine", "projection.direction"),
    ]
    names = [f"projection.name={name}" for name in projections.table()]
    assert listed(capsys, "projection") == [
        "projection.name",
        *names,
        *(f"projection.{key}" for rule in projections.table().values() for key in rule.Options.model_fields),
    ]
    assert listed(capsys, "projection.mu") == ["projection.mu"]


def test_all_keys_and_options_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    plain = [
        f"{place}.{key}".lstrip(".") for place, section in sections(Config, "") for key in section.model_fields
    ]
    assert listed(capsys) == plain
    options = {option for preset in registry.table().presets.values() for option in registry.options_of(preset)}
    every = set(listed(capsys, "--all"))
    assert every >= {*plain, *(f"objective.{option}" for option in options)}
    assert every >= {f"objective.name={name}" for name in registry.table().presets}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("train", [f"train.{key}" for key in TrainConfig.model_fields]),
        ("train.epochs", ["train.epochs"]),
        ("epochs", ["train.epochs"]),
        (
            "batch_size",
            [f"{place}.batch_size" for place in ("data.target", "data.reference", "teacher", "evaluate")],
        ),
        ("lr", ["train.learning_rate"]),
        ("train.lr", ["train.learning_rate"]),
        ("warm-up", ["train", "train.warmup_steps", "train.warmup_rate", "train.cosine_every"]),
        ("objective.weight", ["objective.weight"]),
        ("objective.mean_gradient", ["objective.mean_gradient"] * 2),
        ("snd", ["objective.name=snd"]),
    ],
)
def test_word_selects_keys(capsys: pytest.CaptureFixture[str], word: str, expected: list[str]) -> None:
    assert listed(capsys, word) == expected


def test_section_includes_those_below_and_the_methods_of_objective(capsys: pytest.CaptureFixture[str]) -> None:
    data = listed(capsys, "data")
    assert data[:2] == ["data.target", "data.reference"]
    assert "data.reference.views" in data
    objective = listed(capsys, "objective")
    assert {"objective.weight", "objective.name=dive", "objective.pairwise_weight"} <= set(objective)
    assert keys.main(["pvl"]) == 0
    printed = capsys.readouterr().out
    assert "objective.name=pvl  [method]" in printed
    assert "Options of the reference loss dive (methods: dive, avl, pvl" in printed


def test_json_has_type_default_and_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    assert keys.main(["train.betas", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    expected = {
        "type": "pair of numbers",
        "default": [0.9, 0.999],
        "documentation": "Decay rates of AdamW's moments.",
    }
    assert entry == {"key": "train.betas", "required": False} | expected
    assert keys.main(["data.target.path", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["required"]
    assert "default" not in entry


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("trian", "; did you mean train?"),
        ("train.epocs", "; did you mean train.epochs?"),
        ("learing_rate", "; did you mean train.learning_rate?"),
        ("zzzz", ""),
    ],
)
def test_unknown_word_names_the_nearest(capsys: pytest.CaptureFixture[str], word: str, hint: str) -> None:
    assert keys.main([word]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: no key is named {word}, and no documentation mentions it{hint}\n"
    assert printed.out == ""


def test_keys_is_a_command() -> None:
    assert "keys" in COMMANDS
