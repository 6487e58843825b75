"""The error of a wrong key or value is one line that names the key, the expectation and the source."""

import json
from pathlib import Path

import pytest
from config_files import SMALL, error_of, evaluated, sections, write
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dive_fast.errors import ConfigError
from dive_fast.methods.run_config import load_run_config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.epochs=1", "unknown key trian; did you mean train? (valid: model, data, "),
        ("train.epoch=1", "unknown key train.epoch; did you mean train.epochs? (valid: output, epochs, "),
        ("data.traget.path=x", "unknown key data.traget; did you mean data.target? (valid: target, reference)"),
        (
            "data.target.batchsize=1",
            "unknown key data.target.batchsize; did you mean data.target.batch_size? (valid: ",
        ),
        ("data.reference.view=1", "unknown key data.reference.view; did you mean data.reference.views? (valid: "),
        (
            "evaluate.sets.val.pth=x",
            "unknown key evaluate.sets.val.pth; did you mean evaluate.sets.val.path? (valid: format, path",
        ),
        # Names of sets that pydantic could have given to the branch of a union.
        (
            "evaluate.sets.float.pth=x",
            "unknown key evaluate.sets.float.pth; did you mean evaluate.sets.float.path? (valid: format, ",
        ),
        (
            "evaluate.sets.v[2].pth=x",
            "unknown key evaluate.sets.v[2].pth; did you mean evaluate.sets.v[2].path? (valid: format, ",
        ),
        ("zzz(q=1", "unknown key zzz(q (valid: model, data, objective, projection, teacher, train, evaluate, "),
    ],
)
def test_unknown_key_names_the_nearest_valid_one(tmp_path: Path, override: str, message: str) -> None:
    assert error_of(write(tmp_path), override).startswith(message)


def test_unknown_key_is_reported_before_a_missing_one(tmp_path: Path) -> None:
    tree = {"model": {"nmae": "x"}, "data": SMALL["data"]}
    assert (
        error_of(write(tmp_path, tree))
        == "unknown key model.nmae; did you mean model.name? (valid: name, pretrained, random, logit_scale_max, "
        "lora, freeze, license)"
    )


@st.composite
def typos(draw: st.DrawFn) -> tuple[str, str, str]:
    """(prefix of a section, one of its keys, the key with one typo)."""
    place, keys = draw(st.sampled_from(list(sections())))
    key = draw(st.sampled_from(keys))
    at = draw(st.integers(0, len(key) - 1))
    letter = draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
    slip = draw(
        st.sampled_from(
            [
                key[:at] + key[at + 1 :],
                key[:at] + letter + key[at:],
                key[:at] + letter + key[at + 1 :],
                key[:at] + key[at : at + 2][::-1] + key[at + 2 :],
            ]
        )
    )
    assume(slip not in keys)
    return place, key, slip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("config"))


@given(typos())
@settings(max_examples=200, deadline=None)
def test_any_typo_in_any_key_names_the_intended_key(small: Path, typo: tuple[str, str, str]) -> None:
    place, key, slip = typo
    message = error_of(small, f"{place}{slip}=1")
    assert message.startswith(f"unknown key {place}{slip}; did you mean {place}{key}? (")
    listed = "options of objective.name = dive: weight, " if place == "objective." else "valid: "
    assert message.partition("? (")[2].startswith(listed)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=many", 'train.epochs = "many": input should be a valid integer'),
        ("train.epochs=1.5", "train.epochs = 1.5: input should be a valid integer"),
        ("train.epochs=true", "train.epochs = true: input should be a valid integer"),
        ("train.epochs=null", "train.epochs = null: input should be a valid integer"),
        ("train.learning_rate=[1]", "train.learning_rate = [1]: input should be a valid number"),
        ("train.output=5", "train.output = 5: input should be a valid string"),
        ("train.precision=fp8", "train.precision = \"fp8\": input should be 'fp16', 'bf16' or 'fp32'"),
        ("train=5", "train = 5: input should be an object"),
        ("data.target=a", 'data.target = "a": input should be an object'),
        ("evaluate.sets.val=a", 'evaluate.sets.val = "a": input should be an object'),
        (
            "evaluate.sets.str.format=csv",
            "evaluate.sets.str.format = \"csv\": input should be 'folder', 'webdataset', 'vqa', 'huggingface' "
            "or 'prepared'",
        ),
        ("deepspeed=[]", "deepspeed = []: input should be an object"),
        ("objective.mean_gradient=1", "objective.mean_gradient = 1: input should be a valid boolean"),
        ('train.betas=[0.9, "x"]', 'train.betas.1 = "x": input should be a valid number'),
        # A union: each of its branches is named.
        (
            "data.reference.views=evl",
            "data.reference.views = \"evl\": input should be 'eval' or input should be a va",
        ),
        (
            "data.reference.views=0",
            "data.reference.views = 0: input should be 'eval' or input should be greater th",
        ),
        # Out of range.
        ("train.epochs=0", "train.epochs = 0: input should be greater than 0"),
        ("data.target.workers=-1", "data.target.workers = -1: input should be greater than or equal to 0"),
        ("train.learning_rate=-1e-5", "train.learning_rate = -1e-05: input should be greater than or equal to 0"),
        ("train.learning_rate=NaN", "train.learning_rate = NaN: input should be a finite number"),
        ("objective.weight=Infinity", "objective.weight = Infinity: input should be a finite number"),
        ("objective.decay=1", "objective.decay = 1: input should be less than 1"),
        ("train.betas=[0.9, 1.0]", "train.betas.1 = 1.0: input should be less than 1"),
        ("train.epsilon=0", "train.epsilon = 0: input should be greater than 0"),
        (f"train.seed={2**63}", f"train.seed = {2**63}: input should be less than {2**63}"),
        # Missing.
        ("model={}", "model.name is missing"),
        ('data={"target": {"format": "folder"}}', "data.target.path is missing"),
        ('evaluate.sets.val={"path": "x"}', "evaluate.sets.val.format is missing"),
        ("train.betas=[0.9]", "train.betas.1 is missing"),
        # What does not go together.
        ("data.reference=null", "data.reference: objective.name = dive needs a reference set; name one"),
        ("data.target.image_root=x", "data.target.image_root: only csv and vqa data have one; remove it"),
        ("data.reference.image_root=x", "data.reference.image_root: only csv and vqa data have one; remove it"),
        (
            "data.target.format=webdataset",
            "data.target.class_names: webdataset data needs imagenet or a text file",
        ),
        (
            "data.reference.loader=ffcv",
            "data.reference.loader = ffcv reads prepared sets alone: make one by dive-fast prepare",
        ),
        ('evaluate={"every_steps": 2, "select": "val"}', "evaluate.select: evaluate.sets has no val"),
        (evaluated(every_epochs=1), "evaluate.every_steps and every_epochs: set only one"),
        (evaluated(every_steps=None), "evaluate.during and evaluate.select need every_steps or every_epochs"),
        (evaluated(during=[]), "evaluate.during: add val, the set of evaluate.select"),
        (evaluated(select=None), "evaluate.patience needs evaluate.select"),
        (
            'evaluate.sets.val={"format": "webdataset", "path": "x"}',
            "evaluate.sets.val.class_names: webdataset data needs a text file of names",
        ),
        (
            'evaluate.sets.val={"dataset": "food101", "path": "x", "format": "folder"}',
            "evaluate.sets.val.format: the layout of a known dataset is detected; remove it",
        ),
        (
            'evaluate.sets.val={"dataset": "flickr8k", "path": "x", "task": "retrieval"}',
            "evaluate.sets.val.task: a known dataset has its own; remove it",
        ),
        (
            'evaluate.sets.val={"format": "huggingface", "path": "x", "task": "retrieval", "label_column": "y"}',
            "evaluate.sets.val.label_column: retrieval does not use it; remove it",
        ),
        (
            'evaluate.sets.val={"format": "folder", "path": "x", "metric": "text_to_image_r5"}',
            "evaluate.sets.val.metric: text_to_image_r5 is not a classification metric",
        ),
        (
            'evaluate.sets.val={"format": "folder", "path": "x", "metric": "worst_region"}',
            "evaluate.sets.val.metric: only a known dataset has regions",
        ),
    ],
)
def test_invalid_value_names_key_and_expectation(tmp_path: Path, override: str, message: str) -> None:
    assert error_of(write(tmp_path), override).startswith(message)


@pytest.mark.parametrize("key", ["train.output", "train.resume", "teacher.path", "model.name", "data.target.path"])
def test_empty_path_of_an_unset_variable_is_refused(tmp_path: Path, key: str) -> None:
    assert f'{key} = "": is empty' in error_of(write(tmp_path), f"{key}=")


def test_image_root_needs_csv_and_flyp_no_reference(tmp_path: Path) -> None:
    load_run_config(str(write(tmp_path)), ["data.target.format=csv", "data.target.image_root=x"])
    load_run_config(str(write(tmp_path)), ["data.reference.format=csv", "data.reference.image_root=x"])
    for name in ("flyp", "vanilla_ft", "lp_ft"):
        load_run_config(str(write(tmp_path)), [f"objective.name={name}", "data.reference=null"])


def test_head_needs_classes_which_csv_lacks(tmp_path: Path) -> None:
    message = error_of(write(tmp_path), "data.target.format=csv", "objective.name=lp_ft")
    assert message.startswith("data.target.format = csv has prompts and no classes, which objective.name = lp_ft")


def test_evaluation_during_training_is_valid(tmp_path: Path) -> None:
    config = load_run_config(str(write(tmp_path)), [evaluated()])
    assert (config.evaluate.every_steps, config.evaluate.select, config.evaluate.patience) == (2, "val", 1)


def test_error_names_the_source_of_the_key(tmp_path: Path) -> None:
    path = write(tmp_path)
    for overrides, begins in (
        (
            ["train.epochs=2", "train.lr=1"],
            "command line ('train.lr=1'): unknown key train.lr; did you mean train.learn",
        ),
        (["train.epochs=x"], "command line ('train.epochs=x'): train.epochs = "),
        (['train={"epochs": "x"}'], "command line ("),
        (
            ["warmup_steps=3"],
            "command line ('warmup_steps=3'): unknown key warmup_steps; did you mean train.warmup_st",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            load_run_config(str(path), overrides)
        assert str(caught.value).startswith(begins)
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"trian": {}}))
    with pytest.raises(ConfigError) as caught:
        load_run_config(str(path), ["train.epochs=2"])
    assert str(caught.value).startswith(f"{path}: unknown key trian; did you mean train?")
