"""JSON with comments and YAML are read into the same tree; a mistake is one line with the key or the line."""

import json
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_files import CONFIGS, SMALL, write
from hypothesis import given, settings
from hypothesis import strategies as st

from dive_fast.config.file_formats import FormatError, read_tree
from dive_fast.errors import ConfigError
from dive_fast.methods.run_config import load_run_config

REST = f"model: {{name: x}}\ndata: {json.dumps(SMALL['data'])}\n"
YAML = """\
# my photos
model:
  name: ViT-B-32   # small
data:
  target:
    format: folder
    path: photos/train
    batch_size: 8
  reference: {format: webdataset, path: pairs}
train:
  learning_rate: 1e-5
  betas: [0.9, 0.99]
  max_steps: null
  compile: true
  output: 2026-11-29
"""


def tree_of(folder: Path, text: str | bytes, name: str = "mine.yaml") -> Any:
    return read_tree(write(folder, text, name)).tree


def mistake_in(folder: Path, text: str | bytes, name: str = "mine.yaml") -> str:
    """The error of loading, which begins with the file."""
    path = write(folder, text, name)
    with pytest.raises(ConfigError) as caught:
        load_run_config(str(path))
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def test_yaml_config_equals_the_same_in_json(tmp_path: Path) -> None:
    config = load_run_config(str(write(tmp_path, YAML, "mine.yaml")))
    assert config.model.name == "ViT-B-32"
    assert (config.train.learning_rate, config.train.betas, config.train.compile) == (1e-5, (0.9, 0.99), True)
    assert (config.train.max_steps, config.train.output) == (None, "2026-11-29")
    for shipped in CONFIGS.glob("*.json"):
        tree = json.loads(shipped.read_text())
        assert tree_of(tmp_path, yaml.safe_dump(tree)) == tree


def test_yaml_file_is_a_base_and_has_one(tmp_path: Path) -> None:
    write(tmp_path, YAML, "lowest.yaml")
    write(tmp_path, {"base": "lowest.yaml", "train": {"epochs": 3}}, "middle.json")
    path = write(tmp_path, "base: middle.json\ntrain:\n  seed: 5\n", "mine.yml")
    train = load_run_config(str(path), ["train.weight_decay=1e-2"]).train
    assert (train.learning_rate, train.epochs, train.seed, train.weight_decay) == (1e-5, 3, 5, 0.01)
    write(tmp_path, "base: lowest.yml\n", "mine.yml")
    with pytest.raises(ConfigError, match=r"mine\.yml:1: base = 'lowest\.yml': no such file: .*lowest\.yaml\?$"):
        load_run_config(str(path))


def test_base_may_be_a_shipped_config(tmp_path: Path) -> None:
    path = write(tmp_path, "base: vitb16_dive\n", "mine.yaml")
    assert load_run_config(str(path), folder=CONFIGS).model.name == "ViT-B-16-quickgelu"
    # A file next to the config goes before it.
    write(tmp_path, SMALL, "vitb16_dive.json")
    path = write(tmp_path, "base: vitb16_dive.json\n", "mine.yaml")
    assert load_run_config(str(path), folder=CONFIGS).model.name == "ViT-B-32"


def test_base_of_a_linked_config_lies_next_to_the_file_itself(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").mkdir()
    write(tmp_path / "real", SMALL, "base.json")
    path = write(tmp_path / "real", "base: base.json\n", "mine.yaml")
    (tmp_path / "link/mine.yaml").symlink_to(path)
    assert load_run_config(str(tmp_path / "link/mine.yaml")).model.name == "ViT-B-32"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-1E3", -1000.0),
        (".5", 0.5),
        ("2.", 2.0),
        (".inf", float("inf")),
        ("-.Inf", float("-inf")),
        ("007", 7),
        ("+7", 7),
        ("0x1f", 31),
        ("0o17", 15),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        # Numbers, flags and times of YAML 1.1 are strings, which a key of another type refuses.
        *(
            (text, text)
            for text in ("no", "on", "Yes", "1_000", "12:30", "0b1", "2026-11-29", "=", "1e", "e5", ".")
        ),
        ("'1e-5'", "1e-5"),
        ('"true"', "true"),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
    ],
)
def test_yaml_scalar_has_the_type_of_yaml_1_2(tmp_path: Path, text: str, value: Any) -> None:
    read = tree_of(tmp_path, f"key: {text}\n")["key"]
    assert (read, type(read)) == (value, type(value))


def test_yaml_keys_are_strings_as_written(tmp_path: Path) -> None:
    assert list(tree_of(tmp_path, "no: a\n1: b\n2026-11-29: c\n~: d\n'': e\n")) == [
        "no",
        "1",
        "2026-11-29",
        "~",
        "",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  epochs: 1\n  seed: 2\n  epochs: 3\n", ":4: duplicate key train.epochs, also in line 2"),
        ("model: {name: x, name: y}\n", ":1: duplicate key model.name, also in line 1"),
        (
            "model:\n\tname: x\n",
            ":2: not valid YAML: found character '\\t' that cannot start any token; indent by spa",
        ),
        ("model: name: x\n", ":1: not valid YAML: mapping values are not allowed here"),
        ("model: [x\n", ":2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\n---\nb: 2\n", ":2: not valid YAML: but found another document"),
        ("a: *b\n", ":1: not valid YAML: found undefined alias 'b'"),
        ("? [a]\n: 1\n", ":1: a key is a list or an object; expected a name"),
        ("a: !!python/name:os.system x\n", ":1: a: unknown tag 'tag:yaml.org,2002:python/name:os.system'; rem"),
        ("a: !!set {b}\n", ":1: a: unknown tag 'tag:yaml.org,2002:set'; remove it"),
        ("a:\n  b: !!int x\n", ":2: a.b: 'x' is not of type int"),
        ("a: !!bool 2\n", ":1: a: '2' is not of type bool"),
        (f"a: {'9' * 5000}\n", ":1: a: '999"),
        ('a: "\\0"\n', ": not valid YAML: '\\x00' contains a zero byte, or is not valid UTF-8"),
        ('a: "\\ud800"\n', ": not valid YAML: '\\ud800' contains a zero byte, or is not valid UTF-8"),
        ('a: "\\UFFFFFFFF"\n', ": not valid YAML: "),
        ("a: \x01\n", ":1: not valid YAML: special characters are not allowed: 1"),
        (b"a: \xff\n", ": not valid UTF-8 at byte 3: save the file as UTF-8"),
        ("", ": expected an object with sections model, data, "),
        ("- a\n", ": expected an object with sections model, data, "),
        ("[" * 100_000, ": not valid YAML: nested more than 64 deep"),
        ("a: &a [*a]\n", ":1: not valid YAML: nested more than 64 deep"),
        (f"a: {'x' * 2**20}\n", ": not a config: 1048580 characters, more than the limit of 1048576"),
        ("<<: 5\n", ":1: << needs an object or a list of objects"),
        # Mistakes in sections.
        (f"train:\n  seed: 1\n  lr: 1\n{REST}", ":3: unknown key train.lr; did you mean train.learning_rate?"),
        (f"train:\n  compile: no\n{REST}", ':2: train.compile = "no": input should be a valid boolean'),
        (
            f"train:\n  epochs: 2026-11-29\n{REST}",
            ':2: train.epochs = "2026-11-29": input should be a valid integer',
        ),
        (
            f"train:\n  learning_rate: .nan\n{REST}",
            ":2: train.learning_rate = NaN: input should be a finite number",
        ),
        ("model:\n  random: true\n", ":1: model.name is missing"),
    ],
)
def test_mistake_in_yaml_is_one_line_with_its_place(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert mistake_in(tmp_path, text).startswith(message)


def test_aliases_are_replaced_and_limited(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, "a: &x {b: [1, 2]}\nc: *x\nd: {<<: *x, e: 3}\nf: {b: 4, <<: [*x, {b: 5, g: 6}]}\n")
    assert tree == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}, "d": {"b": [1, 2], "e": 3}, "f": {"b": 4, "g": 6}}
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    laughs += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    begun = time.monotonic()
    assert re.match(r":\d+: more than 100000 values, aliases included", mistake_in(tmp_path, laughs))
    assert time.monotonic() - begun < 30


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab:-[]{}&*!%@#|>?,'\"\\ \n\t<=~.0x\u2028\x85\ufeff"), max_size=40))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, newline="")
    with suppress(FormatError):
        json.dumps(read_tree(path).tree)


# JSON


@pytest.mark.parametrize("name", ["mine.json", "mine.yaml"])
def test_byte_order_mark_is_accepted(tmp_path: Path, name: str) -> None:
    text = json.dumps(SMALL).encode()
    assert load_run_config(str(write(tmp_path, b"\xef\xbb\xbf" + text, name))).model.name == "ViT-B-32"


def test_comments_in_json_are_left_out_but_not_in_strings(tmp_path: Path) -> None:
    text = """# my photos
{
  // "a": 0,
  "a": "http://x#y", // trailing "quote
  "b\\"//": ["# no", 2], # trailing
  "c": 3
} // end"""
    assert tree_of(tmp_path, text, "a.json") == {"a": "http://x#y", 'b"//': ["# no", 2], "c": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"model": {\n  "name": "x", // mine\n}}',
            ": not valid JSON: line 2 has a comma after the last val",
        ),
        ('{"model": [1,]}', ": not valid JSON: line 1 has a comma after the last value; remove it"),
        ('{\n/* x */\n"model": 1}', ": not valid JSON: Expecting property name enclosed in double quotes: line 2"),
        ('{\n// x\n "model": }', ": not valid JSON: Expecting value: line 3 column 11 (char 17)"),
        ('{"model": "x // y\n}', ": not valid JSON: Invalid control character at: line 1 column"),
    ],
)
def test_mistake_in_json_with_comments_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    assert mistake_in(tmp_path, text, "a.json").startswith(message)


def test_block_comment_in_json_names_the_remedy(tmp_path: Path) -> None:
    assert mistake_in(tmp_path, "/* mine */ {}", "a.json").endswith(
        "/* is not a comment here: begin each line with //"
    )
