"""What a config file may say, and how each mistake is told: in one line that names the key and its place."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from dive_fast.config.load import find_config as find_config
from dive_fast.config.reference import reference
from dive_fast.config.schema import Config
from dive_fast.config.section import Section
from dive_fast.config.section import section_type as section_type
from dive_fast.data.open_dataset import open_target
from dive_fast.errors import ConfigError
from dive_fast.methods.run_config import RunConfig, load_run_config

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "launch" / "configs"

SMALL: dict[str, Any] = {
    "model": {"name": "ViT-B-32"},
    "data": {
        "target": {"format": "folder", "path": "target"},
        "reference": {"format": "webdataset", "path": "reference"},
    },
}


def write(folder: Path, content: Any = SMALL) -> Path:
    path = folder / "config.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def evaluated(**options: Any) -> str:
    """An override that asks for evaluation on the way."""
    sets = {"val": {"format": "folder", "path": "x"}}
    return f"evaluate={json.dumps({'sets': sets, 'every_steps': 2, 'select': 'val', 'patience': 1} | options)}"


def complaint(path: Path, *overrides: str) -> str:
    """The error of loading, without the path that it begins with."""
    with pytest.raises(ConfigError) as caught:
        load_run_config(str(path), overrides)
    message = str(caught.value)
    assert "\n" not in message
    if message.startswith("override "):
        return message
    origin = f"{path}: " if message.startswith(f"{path}: ") else message[: message.index("'): ") + len("'): ")]
    assert message.startswith(f"{path}: ") or origin.startswith("command line ('")
    return message.removeprefix(origin)


# Loading


def test_config_in_the_readme_is_valid() -> None:
    text = (REPOSITORY / "README.md").read_text()
    example = text[text.index('    {\n      "model"') :].partition("\n    }\n")[0]
    assert RunConfig.model_validate(json.loads(example + "\n}")).data.target.path == "photos/train"


def test_a_config_is_found_by_path_and_by_name_with_or_without_suffix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_name_that_is_not_there_is_told_with_the_nearest_shipped_one() -> None:
    with pytest.raises(ConfigError, match=r"^--config vitl14_dve: no such file; .*; did you mean vitl14_dive\?$"):
        load_run_config("vitl14_dve", folder=CONFIGS)
    with pytest.raises(ConfigError, match=r"^--config some/vitl14_dive.jsn: .*; did you mean vitl14_dive\?$"):
        load_run_config("some/vitl14_dive.jsn", folder=CONFIGS)
    with pytest.raises(ConfigError, match=r"^--config qqq: no such file; shipped configs: .*vitb16_dive[^?]*$"):
        load_run_config("qqq", folder=CONFIGS)
    with pytest.raises(ConfigError, match=r"^--config qqq: no such file$"):
        load_run_config("qqq")
    # A folder is no config.
    with pytest.raises(ConfigError, match="no such file"):
        load_run_config(str(CONFIGS), folder=CONFIGS)


def test_paths_are_read_as_utf_8(tmp_path: Path) -> None:
    tree = SMALL | {"train": {"output": "läufe/é"}}
    assert load_run_config(str(write(tmp_path, json.dumps(tree, ensure_ascii=False)))).train.output == "läufe/é"


# The paper's hyper-parameters (arXiv 2511.09973, Table 11)

IMAGENET = {"learning_rate": 1e-5, "weight_decay": 0.1, "epochs": 10, "batches": (512, 512)}
WILDS = {"learning_rate": 3e-5, "weight_decay": 0.2, "epochs": 20, "batches": (256, 256)}
PAPER: dict[str, dict[str, Any]] = {
    "vitb16_dive": IMAGENET,
    "vitl14_dive": IMAGENET | {"batches": (512, 256)},
    **{f"vitb16_{name}": IMAGENET | {"batches": (512, None)} for name in ("vanilla_ft", "lp_ft", "flyp")},
    **{f"vitb16_{name}": IMAGENET for name in ("flyp_replay", "snd", "cosine", "avl", "pvl")},
    **{f"{name}_dive": WILDS for name in ("iwildcam", "fmow")},
    # 3e-5 is DiVE's; the baselines have 1e-5 there too (appendix C).
    **{f"{name}_flyp": WILDS | {"learning_rate": 1e-5, "batches": (256, None)} for name in ("iwildcam", "fmow")},
}
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.json"))


def test_every_shipped_config_but_the_demos_is_held_to_the_paper() -> None:
    assert {name for name in SHIPPED if not name.startswith("demo")} == PAPER.keys()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_loads(name: str) -> None:
    load_run_config(name, folder=CONFIGS)


@pytest.mark.parametrize("name", PAPER)
def test_a_shipped_config_has_the_papers_hyper_parameters(name: str) -> None:
    config, paper = load_run_config(name, folder=CONFIGS), PAPER[name]
    data, train = config.data, config.train
    batches = data.target.batch_size, data.reference and data.reference.batch_size
    assert batches == paper["batches"]
    assert train.learning_rate == paper["learning_rate"]
    assert train.weight_decay == paper["weight_decay"]
    assert train.epochs == paper["epochs"]
    assert train.warmup_steps == 500
    assert train.betas == (0.9, 0.999)
    assert train.epsilon == 1e-8
    assert train.decay_all_parameters
    assert train.max_steps is None
    # DeepSpeed would clip at 1 if nothing were said.
    assert config.deepspeed["gradient_clipping"] == 0
    # The paper's "pre-trained" rows are OpenAI's weights, which need quick GELU.
    assert (config.model.pretrained, config.model.name.endswith("-quickgelu")) == ("openai", True)
    objective = config.objective
    assert objective.name == name.partition("_")[2]
    weight = {"snd": 1, "flyp_replay": 1}.get(objective.name, None if data.reference is None else 1000)
    assert (objective.weight, objective.decay, objective.mean_gradient) == (weight, 0.99, True)
    assert (objective.average_weight, objective.pairwise_weight) == (1, 1)
    # Early stopping on ID validation: the best epoch is kept.
    assert (config.evaluate.every_epochs, config.evaluate.select) == (1, next(iter(config.evaluate.sets)))


def write_flyp(folder: Path) -> None:
    """FLYP's folder as its scripts leave it: two templates an image, paths relative to where they ran."""
    lists = {
        "datasets/csv/iwildcam_v2.0/train.csv": "./datasets/data/iwildcam_v2.0/train/a.jpg",
        "datasets/csv/fmow.csv": "./datasets/data/fmow_v1.1/images/rgb_img_7.png",
    }
    for name, image in lists.items():
        for file in (folder / name, folder / image):
            file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(folder / image)
        (folder / name).write_text(f"title\tfilepath\na photo of x.\t{image}\nx in the wild.\t{image}\n")


@pytest.mark.parametrize("name", ["iwildcam_dive", "iwildcam_flyp", "fmow_dive", "fmow_flyp"])
def test_wilds_configs_open_the_csv_of_flyps_scripts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_flyp(tmp_path / "data/flyp")
    config = load_run_config(name, folder=CONFIGS)
    (sample,) = open_target(config.data.target).samples
    assert len(sample.texts) == 2
    # Its evaluation sets lie in the same folder, as WILDS leaves them.
    assert all((tmp_path / (one.path or "")).is_dir() for one in config.evaluate.sets.values())


# Overrides


def test_an_override_is_json_or_else_a_string(tmp_path: Path) -> None:
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


def test_an_override_creates_the_sections_it_needs_and_the_last_one_wins(tmp_path: Path) -> None:
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
def test_an_override_that_is_none_is_an_error(tmp_path: Path, override: str) -> None:
    expected = f"override {override!r}: expected section.key=value, e.g. train.epochs=1"
    assert complaint(write(tmp_path), override) == expected


def test_an_override_below_a_value_is_an_error(tmp_path: Path) -> None:
    message = complaint(write(tmp_path), "model.name.first=3")
    assert message == "override 'model.name.first=3': model.name is a value, not a section"


# Mistakes


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
        ("zzz(q=1", "unknown key zzz(q (valid: model, data, objective, teacher, train, evaluate, deepspeed)"),
    ],
)
def test_an_unknown_key_is_told_with_its_place_and_the_nearest_valid_one(
    tmp_path: Path, override: str, message: str
) -> None:
    assert complaint(write(tmp_path), override).startswith(message)


def test_an_unknown_key_is_told_before_the_missing_one_that_it_stands_for(tmp_path: Path) -> None:
    tree = {"model": {"nmae": "x"}, "data": SMALL["data"]}
    assert (
        complaint(write(tmp_path, tree))
        == "unknown key model.nmae; did you mean model.name? (valid: name, pretrained, random, logit_scale_max)"
    )


def sections(section: type[Section] = Config, place: str = "") -> Iterator[tuple[str, list[str]]]:
    """Every section's place and keys."""
    yield place, list(section.model_fields)
    for key, field in section.model_fields.items():
        if (nested := section_type(field.annotation)) is not None:
            yield from sections(nested, f"{place}{key}.{'any.' if key == 'sets' else ''}")


@st.composite
def typos(draw: st.DrawFn) -> tuple[str, str, str]:
    """(place of a section, one of its keys, the same with one slip of the fingers)."""
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
def test_any_slip_in_any_key_is_told_with_the_key_that_was_meant(small: Path, typo: tuple[str, str, str]) -> None:
    place, key, slip = typo
    assert complaint(small, f"{place}{slip}=1").startswith(
        f"unknown key {place}{slip}; did you mean {place}{key}? (valid: "
    )


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
            "evaluate.sets.str.format = \"csv\": input should be 'folder', 'webdataset' or 'prepared'",
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
        ("data.target.image_root=x", "data.target.image_root: only csv data has one; remove it"),
        ("data.reference.image_root=x", "data.reference.image_root: only csv data has one; remove it"),
        (
            "data.target.format=webdataset",
            "data.target.class_names: webdataset data needs imagenet or a text file",
        ),
        (
            "data.reference.loader=ffcv",
            "data.reference.loader = ffcv reads prepared sets alone: make one by python launch/prepare.py",
        ),
        ('evaluate={"every_steps": 2, "select": "val"}', "evaluate.select: evaluate.sets has no val"),
        (evaluated(every_epochs=1), "evaluate.every_steps and every_epochs: name one"),
        (evaluated(every_steps=None), "evaluate.during and evaluate.select need every_steps or every_epochs"),
        (evaluated(during=[]), "evaluate.during: add val, which evaluate.select chooses by"),
        (evaluated(select=None), "evaluate.patience needs evaluate.select"),
        (
            'evaluate.sets.val={"format": "webdataset", "path": "x"}',
            "evaluate.sets.val.class_names: webdataset data needs a text file of names",
        ),
        (
            'evaluate.sets.val={"dataset": "food101", "path": "x", "format": "folder"}',
            "evaluate.sets.val.format: the layout of a known dataset is found; remove it",
        ),
        (
            'evaluate.sets.val={"dataset": "flickr8k", "path": "x", "task": "retrieval"}',
            "evaluate.sets.val.task: a known dataset has its own; remove it",
        ),
        (
            'evaluate.sets.val={"format": "folder", "path": "x", "task": "retrieval"}',
            "evaluate.sets.val.task: folders have no captions for retrieval",
        ),
        (
            'evaluate.sets.val={"format": "folder", "path": "x", "metric": "text_to_image_r5"}',
            "evaluate.sets.val.metric: text_to_image_r5 is none of classification",
        ),
        (
            'evaluate.sets.val={"format": "folder", "path": "x", "metric": "worst_region"}',
            "evaluate.sets.val.metric: only a known dataset has regions",
        ),
    ],
)
def test_a_bad_value_is_told_with_its_place_and_what_is_expected(
    tmp_path: Path, override: str, message: str
) -> None:
    assert complaint(write(tmp_path), override).startswith(message)


@pytest.mark.parametrize("key", ["train.output", "train.resume", "teacher.path", "model.name", "data.target.path"])
def test_an_empty_path_of_a_shells_unset_variable_is_refused(tmp_path: Path, key: str) -> None:
    assert f'{key} = "": is empty' in complaint(write(tmp_path), f"{key}=")


def test_image_root_goes_with_csv_and_flyp_with_no_reference(tmp_path: Path) -> None:
    load_run_config(str(write(tmp_path)), ["data.target.format=csv", "data.target.image_root=x"])
    load_run_config(str(write(tmp_path)), ["data.reference.format=csv", "data.reference.image_root=x"])
    for name in ("flyp", "vanilla_ft", "lp_ft"):
        load_run_config(str(write(tmp_path)), [f"objective.name={name}", "data.reference=null"])


def test_a_head_needs_classes_which_csv_has_not(tmp_path: Path) -> None:
    message = complaint(write(tmp_path), "data.target.format=csv", "objective.name=lp_ft")
    assert message.startswith("data.target.format = csv has prompts and no classes, which objective.name = lp_ft")


def test_evaluation_on_the_way_can_be_asked_for(tmp_path: Path) -> None:
    config = load_run_config(str(write(tmp_path)), [evaluated()])
    assert (config.evaluate.every_steps, config.evaluate.select, config.evaluate.patience) == (2, "val", 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model": {"name": "x", "name": "y"}}', "key model.name stands twice in one object; keep one"),
        ('{"model": {"name": "x"}, "model": {}}', "key model stands twice in one object; keep one"),
        (
            '{"data": {"target": {"path": "x", "path": "x"}}}',
            "key data.target.path stands twice in one object; keep one",
        ),
        ('{"model":\n {"name": ', "not valid JSON: Expecting value: line 2 column 11 (char 20)"),
        ("", "not valid JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[]", "expected a JSON object with sections model, data, objective, teacher, train, evaluate, deepspeed"),
        (
            "null",
            "expected a JSON object with sections model, data, objective, teacher, train, evaluate, deepspeed",
        ),
        ("{}", "model is missing"),
        (b"\x80\x02\x00\xff", "not valid JSON: 'utf-8' codec can't decode byte 0x80 in position 0: "),
    ],
)
def test_a_file_that_is_no_config_is_told_in_one_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert complaint(write(tmp_path, content)).startswith(message)


# The reference


def test_the_reference_in_docs_is_the_one_generated() -> None:
    written = (REPOSITORY / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == reference(), "run: python -m dive_fast.config.schema > docs/config.md"


def test_the_reference_documents_every_key_in_a_table_of_four_columns() -> None:
    lines = reference().splitlines()
    for place, keys in sections():
        # In code marks: bare, Markdown would take <name> for HTML and drop it.
        heading = f"## `{place.replace('any.', '<name>.').removesuffix('.')}`" if place else "## Sections"
        first = lines.index(heading)
        rows = lines[first + 6 : first + 6 + len(keys)]
        for row, key in zip(rows, keys, strict=True):
            cells = [cell.strip() for cell in row.replace(r"\|", "").strip("|").split("|")]
            assert cells[0] == f"`{key}`"
            assert len(cells) == 4, row
            assert cells[1], row
            assert cells[3], f"{place}{key} has no documentation"


@pytest.mark.parametrize(
    ("key", "kind", "default"),
    [
        ("format", "`folder` or `webdataset` or `csv` or `prepared`", "required"),
        ("batch_size", "integer", "`512`"),
        ("views", "`eval` or integer", '`"eval"`'),
        ("pretrained", "string or `null`", "`null`"),
        ("max_steps", "integer or `null`", "`null`"),
        ("betas", "pair of numbers", "`[0.9, 0.999]`"),
        ("mean_gradient", "`true` or `false`", "`true`"),
        ("learning_rate", "number", "`1e-05`"),
        ("reference", "section or `null`", "`null`"),
        ("train", "section", ""),
        ("sets", "section for each name", "`{}`"),
        ("deepspeed", "object", "`{}`"),
    ],
)
def test_the_reference_says_what_a_value_may_be_in_the_words_of_json(key: str, kind: str, default: str) -> None:
    assert f"| `{key}` | {kind} | {default} | " in reference()


def test_the_home_folder_may_be_called_by_its_sign_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by the type of the field, so that a new path cannot be forgotten."""
    from dive_fast.config.section import Section

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


def test_an_error_names_where_the_key_comes_from(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "model:\n  name: x\n", "a config is JSON, not YAML"),
        ("a.json", '{\n  // the model\n  "model": {}\n}', "line 2 is a comment"),
        ("a.json", '# mine\n{"model": {}}', "line 1 is a comment"),
    ],
)
def test_what_a_file_is_that_is_not_json(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_run_config(str(tmp_path / name))
