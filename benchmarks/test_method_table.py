"""docs/methods.md has every method and every rule in weight space, with the options and configs that exist."""

import json
import re
from pathlib import Path

import method_table
import pytest

from dive_fast.config.schema import NO_PROJECTION
from dive_fast.evaluation import published
from dive_fast.methods import registry
from dive_fast.methods.method import Preset
from dive_fast.methods.run_config import load_run_config
from dive_fast.projections import rules as projections

TEXT = method_table.DOCUMENT.read_text()
PRESETS, RULES = registry.table().presets, projections.table()
WEIGHT_SPACE = TEXT[TEXT.index("## Methods in weight space") : TEXT.index("## Combining losses")]
UNPUBLISHED = {
    *("avl", "pvl", "cosine", "grace", "pmg_aft", "starft", "tecoa", "tracer_dive"),
    *("coop", "kgcoop", "contcoop"),
}
"""Methods without averages over the shifts of ImageNet in the published table."""
OPTION = re.compile(r'`(\w+)` ("[\w ]+"|[\d.]*\d|true|false|null)(?=[,.])')


def section(preset: Preset) -> str:
    """The section of a method in one line."""
    (text,) = re.findall(rf"^### {re.escape(preset.title)}\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return " ".join(text.split())


def test_table_is_up_to_date() -> None:
    assert method_table.replaced(TEXT) == TEXT, "run `python benchmarks/method_table.py`"


def test_table_names_every_method_and_every_config_without_a_projection() -> None:
    table = method_table.table()
    for name in PRESETS:
        assert len(re.findall(rf"^\| \[.*\| `{name}` \|", table, re.MULTILINE)) == 1
    for path in method_table.CONFIGS.glob("*.json"):
        is_plain = load_run_config(path.stem, (), method_table.CONFIGS).projection.name == NO_PROJECTION
        assert (f"`{path.stem}`" in table) == is_plain


def test_costs_are_those_of_every_method() -> None:
    costs = json.loads(method_table.COSTS.read_text())["costs"]
    assert costs.keys() == PRESETS.keys(), "run `python benchmarks/method_table.py --plan`"


def test_published_rows_exist_or_the_method_has_none() -> None:
    assert method_table.PUBLISHED.keys() | UNPUBLISHED == PRESETS.keys()
    assert not method_table.PUBLISHED.keys() & UNPUBLISHED
    methods = {entry.method for entry in published.read() if entry.model == "ViT-B/16"}
    assert methods.issuperset(name for names in method_table.PUBLISHED.values() for name in names)


@pytest.mark.parametrize("name", PRESETS)
def test_section_lists_all_options_with_their_defaults(name: str) -> None:
    preset = PRESETS[name]
    options = {key: part.Options.model_fields[key].default for key, part in registry.options_of(preset).items()}
    if preset.reference is not None:
        options["weight"] = registry.table().references[preset.reference].default_weight
    text = section(preset)
    _, _, listed = text.partition("Options: ")
    assert listed
    listed, _, _ = listed.partition("Start from")
    assert {key: json.loads(value) for key, value in OPTION.findall(listed)} == options


@pytest.mark.parametrize("name", PRESETS)
def test_section_names_a_config_of_the_method(name: str) -> None:
    text = section(PRESETS[name])
    named = re.findall(r"`(\w+)`", text.partition("Start from")[2].partition(".")[0])
    assert named
    for config in named:
        assert load_run_config(config, (), method_table.CONFIGS).objective.name == name


def test_example_combines_losses(tmp_path: Path) -> None:
    (example,) = re.findall(r"^    \{\n.*?^    \}\n", TEXT, re.MULTILINE | re.DOTALL)
    tree = json.loads(example)
    tree["base"] = str(method_table.CONFIGS / tree["base"])
    (tmp_path / "example.json").write_text(json.dumps(tree))
    choice = registry.choose(load_run_config(str(tmp_path / "example.json")).objective)
    assert choice.reference is not None
    assert (choice.target.name, choice.reference.name) == ("carot", "dive")


def test_table_of_rules_is_that_of_the_registry() -> None:
    configs: dict[str, list[str]] = {name: [] for name in RULES}
    for path in sorted(method_table.CONFIGS.glob("*.json")):
        if (name := load_run_config(path.name, (), method_table.CONFIGS).projection.name) != NO_PROJECTION:
            configs[name].append(f"`{path.stem}`")
    rows = re.findall(r"^\| \[(.*)\]\(#.*\) \| `(\w+)` \| (.*?) \| (\d): ", WEIGHT_SPACE, re.MULTILINE)
    assert {name: (title, listed) for title, name, listed, _ in rows} == {
        name: (rule.title, ", ".join(configs[name])) for name, rule in RULES.items()
    }
    copies = {name: 1 + rule(rule.Options()).layout.keeps_previous for name, rule in RULES.items()}
    assert {name: int(count) for _, name, _, count in rows} == copies


@pytest.mark.parametrize("name", RULES)
def test_section_of_a_rule_lists_its_options_and_configs(name: str) -> None:
    rule = RULES[name]
    (text,) = re.findall(rf"^### {re.escape(rule.title)}\n(.*?)(?=^##)", WEIGHT_SPACE, re.MULTILINE | re.DOTALL)
    _, _, listed = " ".join(text.split()).partition("Options: ")
    options, _, rest = listed.partition("Start from")
    defaults = {key: field.default for key, field in rule.Options.model_fields.items()}
    assert {key: json.loads(value) for key, value in OPTION.findall(options)} == defaults
    named = re.findall(r"`(\w+)`", rest.partition(".")[0])
    assert named
    for config in named:
        assert load_run_config(config, (), method_table.CONFIGS).projection.name == name


def test_losses_of_both_halves_are_named() -> None:
    text = TEXT[TEXT.index("## Combining losses") :]
    for names in (registry.table().targets, registry.table().references):
        assert all(f"`{name}`" in text for name in names)
