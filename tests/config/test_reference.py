"""docs/config.md is generated, and documents every key."""

import pytest
from config_files import REPOSITORY, sections

from dive_fast.config.reference import rows
from dive_fast.methods import registry
from dive_fast.methods.run_config import config_reference


def test_reference_in_docs_is_up_to_date() -> None:
    written = (REPOSITORY / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == config_reference(), "run: python -m dive_fast.methods.run_config > docs/config.md"


def test_reference_documents_every_key_in_four_columns() -> None:
    lines = config_reference().splitlines()
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


def test_reference_documents_every_method_and_option() -> None:
    text, table = config_reference(), registry.table()
    for preset in table.presets.values():
        assert f"| `{preset.name}` | {preset.title}: {preset.summary} | `{preset.target}` | " in text
    for half, parts in (("target", table.targets), ("reference", table.references)):
        for name, part in parts.items():
            lines = list(rows(part.Options))
            assert len(lines) == 2 + len(part.Options.model_fields)
            assert all(field.description for field in part.Options.model_fields.values())
            if part.Options.model_fields:
                assert "\n".join((f"### Options of the {half} loss `{name}`", "", *lines)) in text


@pytest.mark.parametrize(
    ("key", "kind", "default"),
    [
        ("format", "`folder` or `webdataset` or `csv` or `huggingface` or `prepared`", "required"),
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
def test_reference_names_types_as_json_does(key: str, kind: str, default: str) -> None:
    assert f"| `{key}` | {kind} | {default} | " in config_reference()
