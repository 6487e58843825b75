"""Configs are found, read and merged: files, their bases, overrides."""

import json
from pathlib import Path
from typing import Any

import pytest
from config_files import CONFIGS, SMALL, error_of, write

from dive_fast.config.load import find_config
from dive_fast.config.section import Section
from dive_fast.errors import ConfigError
from dive_fast.methods.registry import choose
from dive_fast.methods.run_config import RunConfig, load_run_config


def test_config_is_found_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_name = load_run_config("vitb16_dive", folder=CONFIGS)
    assert (
        by_name
        == load_run_config("vitb16_dive.json", folder=CONFIGS)
        == load_run_config(str(CONFIGS / "vitb16_dive.json"))
    )
    # A file of the user's goes before a shipped one of the same name.
    write(tmp_path).rename("vitb16_dive.json")
    assert load_run_config("vitb16_dive.json", folder=CONFIGS).model.name == "ViT-B-32"
    assert find_config("vitb16_dive", CONFIGS) == CONFIGS / "vitb16_dive.json"


def test_missing_config_names_the_nearest_shipped_one() -> None:
    with pytest.raises(ConfigError, match=r"^--config vitl14_dve: no such file; did you mean vitl14_dive\?$"):
        load_run_config("vitl14_dve", folder=CONFIGS)
    with pytest.raises(
        ConfigError, match=r"^--config some/vitl14_dive.jsn: no such file; did you mean vitl14_dive\?$"
    ):
        load_run_config("some/vitl14_dive.jsn", folder=CONFIGS)
    with pytest.raises(ConfigError, match=r"^--config qqq: no such file; shipped configs: .*vitb16_dive[^?]*$"):
        load_run_config("qqq", folder=CONFIGS)
    with pytest.raises(ConfigError, match=r"^--config qqq: no such file$"):
        load_run_config("qqq")
    # A folder is not a config.
    with pytest.raises(ConfigError, match="no such file"):
        load_run_config(str(CONFIGS), folder=CONFIGS)


def test_config_is_read_as_utf_8(tmp_path: Path) -> None:
    tree = SMALL | {"train": {"output": "läufe/é"}}
    assert load_run_config(str(write(tmp_path, json.dumps(tree, ensure_ascii=False)))).train.output == "läufe/é"


# Overrides


def test_override_is_json_otherwise_a_string(tmp_path: Path) -> None:
    config = load_run_config(
        str(write(tmp_path)),
        [
            "train.epochs=3",
            "train.learning_rate=3e-5",
            "train.betas=[0.8, 0.9]",
            "train.max_steps=null",
            "objective.mean_gradient=false",
            "data.target.path=a=b.c d",
            'data.target.templates="5"',
            "data.reference.views=2",
            'teacher={"mode": "online"}',
        ],
    )
    assert config.train.epochs == 3
    assert config.train.learning_rate == 3e-5
    assert config.train.betas == (0.8, 0.9)
    assert config.train.max_steps is None
    assert config.objective.mean_gradient is False
    assert config.data.target.path == "a=b.c d"
    assert config.data.target.templates == "5"
    assert config.data.reference is not None
    assert config.data.reference.views == 2
    assert config.teacher.mode == "online"


def test_override_creates_sections_and_the_last_wins(tmp_path: Path) -> None:
    config = load_run_config(
        str(write(tmp_path)),
        [
            "evaluate.sets.val.format=folder",
            "evaluate.sets.val.path=here",
            "evaluate.sets.val.path=there",
            "deepspeed.zero_optimization.stage=2",
        ],
    )
    assert config.evaluate.sets["val"].path == "there"
    assert config.deepspeed == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train..epochs=3", ".epochs=3", ""])
def test_override_without_key_or_value_is_an_error(tmp_path: Path, override: str) -> None:
    expected = f"override {override!r}: expected section.key=value, e.g. train.epochs=1"
    assert error_of(write(tmp_path), override) == expected


def test_override_below_a_value_is_an_error(tmp_path: Path) -> None:
    message = error_of(write(tmp_path), "model.name.first=3")
    assert message == "override 'model.name.first=3': model.name is a value, not a section"


# Bases


def write_pair(folder: Path, own: dict[str, Any], base: Any = SMALL) -> Path:
    """A config on ``base.json``."""
    write(folder, base, "base.json")
    return write(folder, {"base": "base.json"} | own)


def test_base_is_merged_key_by_key(tmp_path: Path) -> None:
    base = SMALL | {"train": {"betas": [0.8, 0.9], "epochs": 3}, "deepspeed": {"zero_optimization": {"stage": 2}}}
    own = {"data": {"target": {"workers": 1}}, "train": {"betas": [0.7, 0.9]}, "deepspeed": {"x": {"y": 1}}}
    config = load_run_config(str(write_pair(tmp_path, own, base)), ["train.seed=5"])
    assert (config.data.target.path, config.data.target.workers) == ("target", 1)
    assert (config.train.betas, config.train.epochs, config.train.seed) == ((0.7, 0.9), 3, 5)
    assert config.deepspeed == {"zero_optimization": {"stage": 2}, "x": {"y": 1}}
    # The resolved config is the complete one.
    assert "base" not in config.model_dump(mode="json")


def test_null_and_value_replace_a_section_of_the_base(tmp_path: Path) -> None:
    own = {"data": {"reference": None}, "objective": {"name": "flyp"}}
    assert load_run_config(str(write_pair(tmp_path, own))).data.reference is None


def test_null_removes_an_evaluation_set_of_the_base(tmp_path: Path) -> None:
    sets = {name: {"format": "folder", "path": name} for name in ("a", "b")}
    own = {"evaluate": {"sets": {"a": None}}}
    config = load_run_config(str(write_pair(tmp_path, own, SMALL | {"evaluate": {"sets": sets}})))
    assert list(config.evaluate.sets) == ["b"]
    (tmp_path / "chosen").mkdir()
    chosen = {"sets": sets, "every_steps": 1, "select": "a"}
    path = write_pair(tmp_path / "chosen", own, SMALL | {"evaluate": chosen})
    with pytest.raises(ConfigError, match=r"evaluate\.select: evaluate\.sets has no a"):
        load_run_config(str(path))


def test_bases_form_a_chain_relative_to_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "some" / "where"
    folder.mkdir(parents=True)
    write(tmp_path, SMALL | {"train": {"epochs": 1, "seed": 1, "log_every": 1}}, "lowest.json")
    write(folder, {"base": "../../lowest.json", "train": {"epochs": 2, "seed": 2}}, "middle.json")
    path = write(tmp_path, {"base": "some/where/middle.json", "train": {"epochs": 3}})
    monkeypatch.chdir(folder)
    train = load_run_config(str(path)).train
    assert (train.epochs, train.seed, train.log_every) == (3, 2, 1)
    write(tmp_path, {"base": str(path), "train": {"log_every": 7}}, "absolute.json")
    assert load_run_config("../../absolute.json").train.log_every == 7


@pytest.mark.parametrize("length", [1, 2, 3])
def test_circle_of_bases_is_refused(tmp_path: Path, length: int) -> None:
    for index in range(length):
        write(tmp_path, {"base": f"{(index + 1) % length}.json"}, f"{index}.json")
    path = write(tmp_path, {"base": "0.json"})
    with pytest.raises(ConfigError, match=r"base leads back to this file: .*config\.json -> .*0\.json") as caught:
        load_run_config(str(path))
    assert str(caught.value).startswith(f"{tmp_path}/0.json: ")


def test_chain_of_bases_can_be_long(tmp_path: Path) -> None:
    write(tmp_path, SMALL, "0.json")
    for index in range(1, 1100):
        write(tmp_path, {"base": f"{index - 1}.json"}, f"{index}.json")
    assert load_run_config(str(tmp_path / "1099.json")).model.name == "ViT-B-32"


def test_two_configs_can_share_a_base(tmp_path: Path) -> None:
    # The lowest file is read once in each chain, which is not a circle.
    write(tmp_path, SMALL, "base.json")
    write(tmp_path, {"base": "base.json"}, "other.json")
    assert load_run_config(str(write(tmp_path, {"base": "other.json"}))) == load_run_config(
        str(tmp_path / "base.json")
    )


def test_missing_base_names_the_nearest_file(tmp_path: Path) -> None:
    path = write_pair(tmp_path, {"base": "bsae.json"})
    assert error_of(path) == f"base = 'bsae.json': no such file: {tmp_path}/bsae.json; did you mean base.json?"
    path = write_pair(tmp_path, {"base": "no/folder.json"})
    assert error_of(path) == f"base = 'no/folder.json': no such file: {tmp_path}/no/folder.json"
    path = write_pair(tmp_path, {"base": "."})
    assert error_of(path).startswith("base = '.': no such file: ")
    path = write_pair(tmp_path, {"base": "x" * 5000})
    assert error_of(path).startswith("base = 'xxx")


@pytest.mark.parametrize("base", [5, None, ["base.json"], {"name": "base.json"}, "", " "])
def test_base_that_is_not_a_file_name_is_refused(tmp_path: Path, base: Any) -> None:
    assert error_of(write_pair(tmp_path, {"base": base})).endswith(
        'expected a config file, e.g. "vitb16_dive.json"'
    )


@pytest.mark.parametrize("override", ["base=base.json", "base.train.epochs=1"])
def test_base_on_the_command_line_is_refused(tmp_path: Path, override: str) -> None:
    message = error_of(write_pair(tmp_path, {}), override)
    assert message == f"override {override!r}: only a file can have a base; name the config by --config"


def test_base_in_a_section_is_an_unknown_key(tmp_path: Path) -> None:
    path = write_pair(tmp_path, {"train": {"base": "base.json"}})
    assert error_of(path).startswith("unknown key train.base")


def test_error_names_the_file_that_sets_the_key(tmp_path: Path) -> None:
    def source_of(path: Path, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load_run_config(str(path), overrides)
        return str(caught.value).replace(f"{tmp_path}/", "")

    for wrong, message in (
        ({"trian": {}}, "unknown key trian; did you mean train?"),
        ({"train": {"epochs": "x"}}, 'train.epochs = "x": input'),
        ({"train": {"lr": 1}}, "unknown key train.lr; did you mean train.learning_rate?"),
        ({"objective": {"decya": 1}}, "unknown key objective.decya; did you mean objective.decay?"),
        ({"objective": {"decay": 1}}, "objective.decay = 1: input"),
        (
            {"objective": {"reference": {"name": "snd", "x": 1}}},
            "unknown key objective.reference.x (options of snd",
        ),
        ({"evaluate": {"sets": {"val": {"path": "x"}}}}, "evaluate.sets.val.format is missing; or"),
        ({"data": {"target": SMALL["data"]["target"] | {"image_root": "x"}}}, "data.target.image_root: only csv"),
        ({"deepspeed": {"x": 1}, "evaluate": {"select": "val"}}, "evaluate.select: evaluate.sets has no val"),
    ):
        own = write_pair(tmp_path, {}, {**SMALL, **wrong, "data": SMALL["data"] | wrong.get("data", {})})
        assert source_of(own).startswith(f"base.json: {message}")
        assert source_of(own, "train.seed=3").startswith(f"base.json: {message}")
        assert source_of(write_pair(tmp_path, wrong)).startswith(f"config.json: {message}")
    own = write_pair(tmp_path, {"train": {"epochs": 2}}, SMALL | {"train": {"epochs": 1}})
    assert source_of(own, "train.epochs=x").startswith("command line ('train.epochs=x'): train.epochs = ")
    # Corrected above the base, the base's value is not an error.
    assert load_run_config(str(write_pair(tmp_path, {"train": {"epochs": 2}}, SMALL | {"train": {"epochs": "x"}})))
    for content, message in (('{"model": {}, "model": {}}', "duplicate key model"), ("[]", "expected an object")):
        own = write_pair(tmp_path, {}, content)
        assert source_of(own).startswith(f"base.json: {message}")
    write(tmp_path, '{"base": "base.json", "base": "base.json"}', "config.json")
    assert source_of(own) == "config.json: duplicate key base"


# Another method than the base's

VECTORS = {"decay": 0.9, "average_weight": 0.5, "pairwise_weight": 0.25, "mean_gradient": False}


@pytest.mark.parametrize(
    ("own", "resolved"),
    [
        ({"name": "flyp"}, {"name": "flyp"}),
        ({"name": "snd"}, {"name": "snd", "reference_every": 2}),
        ({"name": "snd", "weight": 3.0}, {"name": "snd", "weight": 3.0, "reference_every": 2}),
        (
            {"name": "avl"},
            {
                "name": "avl",
                "reference_every": 2,
                **{key: value for key, value in VECTORS.items() if key != "pairwise_weight"},
            },
        ),
        (
            {"name": "cosine", "mean_gradient": True},
            {
                "name": "cosine",
                "reference_every": 2,
                "decay": 0.9,
                "average_start": 0,
                "mean_gradient": True,
            },
        ),
        ({"reference": "none"}, {"name": "flyp"}),
        ({"reference": "snd"}, {"name": "snd", "reference_every": 2}),
        ({"reference": {"name": "snd"}}, {"name": "snd", "reference_every": 2}),
        ({"target": "cross_entropy", "reference": "none"}, {"name": "vanilla_ft", "head_start": "zero_shot"}),
        (
            {"name": None, "target": "contrastive", "reference": "snd"},
            {"name": "snd", "reference_every": 2},
        ),
    ],
)
@pytest.mark.parametrize("source", ["file", "override"])
def test_options_of_the_former_method_are_left_out(
    tmp_path: Path, own: dict[str, Any], resolved: dict[str, Any], source: str
) -> None:
    base = SMALL | {"objective": {"name": "dive", "weight": 7.0, "reference_every": 2, **VECTORS}}
    overrides = [f"objective.{key}={json.dumps(value)}" for key, value in own.items()]
    if source == "file":
        config = load_run_config(str(write_pair(tmp_path, {"objective": own}, base)))
    else:
        config = load_run_config(str(write(tmp_path, base)), overrides)
    common = {"weight": None, "reference_every": 1, "target": None, "reference": None}
    assert config.objective.model_dump() == common | resolved


@pytest.mark.parametrize(
    ("weight", "own", "kept", "lines"),
    [
        # A weight was chosen for its method: the new one starts with its own, in one line.
        (7.0, {"name": "snd"}, None, 1),
        (7.0, {"reference": "snd"}, None, 1),
        (7.0, {"name": "snd", "weight": 3.0}, 3.0, 0),
        (1000.0, {"name": "avl"}, 1000.0, 0),
        (7.0, {"name": "flyp"}, None, 0),
        (7.0, {"target": {"name": "cross_entropy"}}, 7.0, 0),
        (7.0, {"decay": 0.5}, 7.0, 0),
    ],
)
def test_weight_of_another_method_is_not_used_and_reported(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    weight: float,
    own: dict[str, Any],
    kept: float | None,
    lines: int,
) -> None:
    base = SMALL | {"objective": {"weight": weight}}
    assert load_run_config(str(write_pair(tmp_path, {"objective": own}, base))).objective.weight == kept
    reports = [
        record.message for record in caplog.records if "objective.weight = 7.0 was set for" in record.message
    ]
    assert len(reports) == lines
    assert all("the default of snd is 1" in report for report in reports)


@pytest.mark.parametrize("nested", [False, True])
def test_option_of_another_size_in_the_former_method_is_not_used_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, nested: bool
) -> None:
    options = {"distillation_weight": 0.5, "teacher_every": 1, "projection_weight": 0.2}
    former = {"name": "tracer", **options}
    pair = {"name": None, "target": former, "reference": "none"}
    base = SMALL | {"objective": pair if nested else former}
    keys = ["objective.name=null", 'objective.target.name="{}"'] if nested else ['objective.name="{}"']
    prefix = "objective.target" if nested else "objective"

    def resolved(name: str, *overrides: str) -> dict[str, Any]:
        caplog.clear()
        named = [key.format(name) for key in keys]
        config = load_run_config(str(write(tmp_path, base)), [*named, *overrides])
        return choose(config.objective).target_options.model_dump()

    carot = resolved("carot")
    # The last one has the same default in both.
    assert [carot[key] for key in options] == [1.5, 500, 0.2]
    assert f"{prefix}.distillation_weight = 0.5 was set for another method" in caplog.text
    assert "the default of carot is 1.5" in caplog.text
    # The former method's default is not reported: nobody chose it.
    assert "teacher_every" not in caplog.text
    assert resolved("carot", f"{prefix}.distillation_weight=0.7")["distillation_weight"] == 0.7
    assert not caplog.text
    if not nested:
        # The same part, in another method.
        assert resolved("tracer_fd")["distillation_weight"] == 0.5
        assert not caplog.text


def test_nested_options_of_the_former_loss_are_left_out(tmp_path: Path) -> None:
    objective = {"name": None, "target": "contrastive", "reference": {"name": "dive", "decay": 0.9}}
    base = SMALL | {"objective": objective}
    for own in ({"reference": {"name": "snd"}}, {"reference": "snd"}, {"name": "snd"}):
        config = load_run_config(str(write_pair(tmp_path, {"objective": own}, base)))
        assert config.objective.name == "snd"
    config = load_run_config(str(write(tmp_path, base)), ["objective.reference.name=cosine"])
    # Both have a decay, which stays.
    assert (config.objective.name, config.objective.decay) == ("cosine", 0.9)
    message = error_of(write(tmp_path, base), "objective.reference.name=snd", "objective.reference.decay=0.5")
    assert message == "unknown key objective.reference.decay (options of snd: none)"


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.name=flyp", "objective.decay=0.5"],
        ["objective.decay=0.5", "objective.name=flyp"],
        ['objective={"name": "flyp", "decay": 0.5}'],
        ["objective.name=snd", 'objective={"name": "flyp", "decay": 0.5}'],
        ["objective.decay=0.5"],
    ],
)
def test_option_set_together_with_the_method_is_an_error(tmp_path: Path, overrides: list[str]) -> None:
    base = SMALL | {"objective": {"name": "dive", "decay": 0.9}}
    message = "unknown key objective.decay (options of objective.name = flyp: none)"
    if overrides == ["objective.decay=0.5"]:
        # The file names the other method.
        assert error_of(write_pair(tmp_path, {"objective": {"name": "flyp"}}, base), *overrides) == message
        assert error_of(write_pair(tmp_path, {"objective": {"name": "flyp", "decay": 0.9}}, base)) == message
    else:
        assert error_of(write(tmp_path, base), *overrides) == message
        assert error_of(write_pair(tmp_path, {"objective": {"name": "flyp"}}, base), *overrides) == message


def test_options_belong_to_the_loss_that_a_base_names(tmp_path: Path) -> None:
    base = SMALL | {"objective": {"reference": "cosine"}}
    options = {"objective": {"reference": {"decay": 0.5}}}
    for config in (
        load_run_config(str(write_pair(tmp_path, options, base))),
        load_run_config(str(write(tmp_path, base)), ["objective.reference.decay=0.5"]),
        load_run_config(str(write(tmp_path)), ["objective.reference=cosine", "objective.reference.decay=0.5"]),
    ):
        assert (config.objective.name, config.objective.decay) == ("cosine", 0.5)
    message = error_of(write(tmp_path, base), "objective.reference.x=1")
    assert message.startswith("unknown key objective.reference.x (options of cosine: decay")


def test_method_named_above_a_base_replaces_its_losses(tmp_path: Path) -> None:
    base = SMALL | {"objective": {"weight": 7.0, "reference": {"name": "cosine", "average_start": 1}}}
    for config in (
        load_run_config(str(write_pair(tmp_path, {"objective": {"name": "dive"}}, base))),
        load_run_config(str(write(tmp_path, base)), ["objective.name=dive"]),
    ):
        assert (config.objective.name, config.objective.weight) == ("dive", None)
    config = load_run_config(str(write(tmp_path, base)), ["objective.name=dive", "objective.reference=snd"])
    assert config.objective.name == "snd"


def test_unknown_option_below_another_method_is_an_error(tmp_path: Path) -> None:
    for objective, key in (
        ({"decya": 0.9}, "objective.decya"),
        ({"reference": {"name": "dive", "decya": 0.9}}, "objective.reference.decya"),
    ):
        base = SMALL | {"objective": objective}
        own = {"name": "flyp"} if key == "objective.decya" else {"reference": {"name": "snd"}}
        with pytest.raises(ConfigError, match=rf"base\.json: unknown key {key}"):
            load_run_config(str(write_pair(tmp_path, {"objective": own}, base)))


@pytest.mark.parametrize("objective", [5, None, [], {"name": []}, {"name": "x"}, {"name": {}, "reference": []}])
def test_invalid_objective_over_a_base_is_an_error(tmp_path: Path, objective: Any) -> None:
    base = SMALL | {"objective": {"name": "dive", "decay": 0.9, "reference": {"name": "snd"}}}
    assert error_of(write_pair(tmp_path, {"objective": objective}, base)).startswith("objective")
    assert error_of(write(tmp_path, base), f"objective={json.dumps(objective)}").startswith("objective")


# Files that are not configs


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model": {"name": "x", "name": "y"}}', "duplicate key model.name"),
        ('{"model": {"name": "x"}, "model": {}}', "duplicate key model"),
        (
            '{"data": {"target": {"path": "x", "path": "x"}}}',
            "duplicate key data.target.path",
        ),
        ('{"model":\n {"name": ', "not valid JSON: Expecting value: line 2 column 11 (char 20)"),
        ("", "not valid JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[]", "expected an object with sections model, data, objective, projection, teacher, train, "),
        (
            "null",
            "expected an object with sections model, data, objective, projection, teacher, train, evaluate, "
            "track, deepspeed",
        ),
        ("{}", "model is missing"),
        (b"\x80\x02\x00\xff", "not valid UTF-8 at byte 0: save the file as UTF-8"),
    ],
)
def test_invalid_file_is_an_error_of_one_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert error_of(write(tmp_path, content)).startswith(message)


def test_home_folder_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields are collected by name, so that a new path cannot be forgotten."""
    monkeypatch.setenv("HOME", "/home/someone")
    paths = {"path", "image_root", "class_names", "templates", "output", "resume", "pretrained"}
    seen = 0
    for section in Section.__subclasses__():
        for name, field in section.model_fields.items():
            if name in paths or "path" in name or "folder" in name:
                seen += 1
                assert "PathText" in str(section.__annotations__[name]) or any(
                    "_expanded" in str(part) for part in (field.metadata, field.annotation)
                ), f"{section.__name__}.{name}"
    assert seen >= 15
    tree = {
        "model": {"name": "local-dir:~/model"},
        "data": {"target": {"format": "csv", "path": "~/a.csv", "image_root": "~", "templates": "~{}~/x"}},
        "objective": {"name": "flyp"},
        "train": {"output": "~/runs/a", "resume": "auto"},
    }
    config = RunConfig.model_validate(tree)
    assert config.model.name == "local-dir:/home/someone/model"
    assert config.data.target.path == "/home/someone/a.csv"
    assert config.data.target.image_root == "/home/someone"
    assert config.data.target.templates == "~{}~/x"
    assert (config.train.output, config.train.resume) == ("/home/someone/runs/a", "auto")


@pytest.mark.parametrize(
    "override", ["track=wandb, mlflow", "track=[wandb,mlflow]", 'track=["wandb","mlflow","wandb"]']
)
def test_trackers_are_a_list_of_names(override: str) -> None:
    assert load_run_config("demo", [override], CONFIGS).track == ["wandb", "mlflow"]


def test_another_projection_has_none_of_the_former_options(tmp_path: Path) -> None:
    pair = write_pair(
        tmp_path,
        {"projection": {"name": "l2sp", "form": "decoupled"}},
        SMALL | {"projection": {"name": "digrap", "mu": 0.1}},
    )

    def options(*overrides: str) -> dict[str, Any]:
        return load_run_config(str(pair), overrides).projection.model_dump()

    assert options() == {"name": "l2sp", "strength": 0.01, "form": "decoupled"}
    assert options("projection.strength=3") == {"name": "l2sp", "strength": 3, "form": "decoupled"}
    spd = {"name": "spd", "strength": 3}
    assert options("projection.name=spd", "projection.strength=3") == spd
    assert options("projection.strength=3", "projection.name=spd") == spd
    assert options("projection.name=none") == {"name": "none"}
    assert options("projection.name=l2sp") == options()
    # An option that was set without a name is of the rule that is named above it.
    unnamed = write_pair(tmp_path, {"projection": {"name": "ftp"}}, SMALL | {"projection": {"k": 0.5}})
    assert load_run_config(str(unnamed)).projection.model_dump() == {"name": "ftp", "k": 0.5}
    alone = load_run_config(str(write(tmp_path, SMALL)), ["projection.k=0.5", "projection.name=ftp"])
    assert alone.projection.model_dump() == {"name": "ftp", "k": 0.5}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["projection.name=spdd"], r'projection.name = "spdd": expected one of none, digrap, .*mean spd'),
        (
            ["projection.mu=1"],
            r"unknown key projection.mu.*none has no options: name one of digrap, .*spd\)$",
        ),
        (
            ["projection.name=digrap", "projection.nu=1"],
            r"unknown key projection.nu; did you mean projection.mu.*options of",
        ),
        (["projection.name=ftp", "projection.k=1.5"], r"projection.k = 1.5: .*less than or equal to 1"),
    ],
)
def test_mistake_in_a_projection_names_its_key(tmp_path: Path, overrides: list[str], message: str) -> None:
    path = write(tmp_path, SMALL)
    with pytest.raises(ConfigError, match=message):
        load_run_config(str(path), overrides)


def test_projection_changes_the_default_weight_decay_alone(tmp_path: Path) -> None:
    path = str(write(tmp_path, SMALL))
    assert load_run_config(path).train.weight_decay == 0.1
    assert load_run_config(path, ["projection.name=spd"]).train.weight_decay == 0
    both = ["projection.name=spd", "train.weight_decay=0.2"]
    assert load_run_config(path, both).train.weight_decay == 0.2
