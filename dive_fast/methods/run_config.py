"""The config of a run with its method.

``python -m dive_fast.methods.run_config`` prints the configuration reference, docs/config.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import model_validator

from dive_fast.config.load import load_config
from dive_fast.config.reference import reference, rows
from dive_fast.config.schema import NO_PROJECTION, Config
from dive_fast.config.section import KeyedError
from dive_fast.methods import registry
from dive_fast.projections import rules as projections


class RunConfig(Config):
    """A config whose ``objective`` and ``projection`` are validated by their methods; options are filled in."""

    @model_validator(mode="after")
    def _check_objective(self) -> "RunConfig":
        objective = registry.resolve(self.objective)
        needs = registry.choose(objective).needs
        method = f"objective.name = {objective.name}" if objective.name else "this objective"
        if needs.reference and self.data.reference is None:
            raise KeyedError("data.reference", f"data.reference: {method} needs a reference set; name one")
        if needs.prompts:
            _check_prompts(self, needs.reference, method)
        streams = self.data.reference is not None and self.data.reference.order == "stream"
        if streams and needs.reference_teacher and self.teacher.mode == "cache":
            raise KeyedError(
                "teacher.mode",
                "teacher.mode = cache: with data.reference.order = stream no pairs are known before training, so "
                "that none can be embedded; set teacher.mode=online, or data.reference.order=indexed",
            )
        target = self.data.target
        if needs.classes and target.has_prompts:
            has_column = target.text_column is not None
            key, value = ("text_column", target.text_column) if has_column else ("format", target.format)
            raise KeyedError(
                f"data.target.{key}",
                f"data.target.{key} = {value} has prompts and no classes, which {method} needs; "
                + ("take folder, webdataset or prepared" if key == "format" else "set label_column instead"),
            )
        return self.model_copy(update={"objective": objective, "projection": projections.resolve(self.projection)})

    @classmethod
    def drop_inherited(cls, tree: dict[str, Any], inherited: Mapping[str, Mapping[str, Any]]) -> None:
        """Removes options of a base config's method that the method now chosen lacks."""
        registry.drop_inherited(tree["objective"], inherited)


def _check_prompts(config: Config, has_reference: bool, method: str) -> None:
    """Validates that no option is of the model's weights, where the method trains prompts."""
    unused = {
        "objective.reference": has_reference,
        "model.lora": config.model.lora is not None,
        "projection.name": config.projection.name != NO_PROJECTION,
        "train.ema": config.train.ema is not None,
    }
    for key, is_set in unused.items():
        if is_set:
            raise KeyedError(key, f"{key}: {method} trains prompts and no weight of the model; remove it")


def load_run_config(name: str, overrides: Sequence[str] = (), folder: Path | None = None) -> RunConfig:
    """Reads a config by path or by its name in ``folder``; see :func:`dive_fast.config.load.load_config`.

    Raises:
        ConfigError: as there; or the method lacks an option, or needs data that the config does not name.
    """
    return load_config(name, overrides, folder, RunConfig)


def _methods() -> Iterator[str]:
    """The lines of the reference on methods and options of their parts."""
    table = registry.table()
    yield from ("## Methods", "", "Values of `objective.name`; each has its options in `objective`.", "")
    yield from ("| name | method | target loss | reference loss | weight | options |", "|---|---|---|---|---|---|")
    for preset in table.presets.values():
        options = ", ".join(f"`{option}`" for option in registry.options_of(preset))
        reference = "" if preset.reference is None else f"`{preset.reference}`"
        weight = "" if preset.reference is None else f"{table.references[preset.reference].default_weight:g}"
        cells = (f"`{preset.name}`", f"{preset.title}: {preset.summary}", f"`{preset.target}`", reference, weight)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in (*cells, options))} |"
    for half, parts in (("target", table.targets), ("reference", table.references)):
        for name, part in parts.items():
            if part.Options.model_fields:
                yield from ("", f"### Options of the {half} loss `{name}`", "", *rows(part.Options))


def _projections() -> Iterator[str]:
    """The lines of the reference on methods in weight space and their options."""
    table = projections.table()
    yield from ("", "## Methods in weight space", "")
    yield from ("Values of `projection.name`; each has its options in `projection`.", "")
    yield from ("| name | method | options |", "|---|---|---|")
    for name, rule in table.items():
        options = ", ".join(f"`{option}`" for option in rule.Options.model_fields)
        yield f"| `{name}` | {rule.title}: {rule.summary} | {options} |"
    for name, rule in table.items():
        if rule.Options.model_fields:
            yield from ("", f"### Options of `{name}`", "", *rows(rule.Options))


def config_reference() -> str:
    """The configuration reference in Markdown, docs/config.md."""
    return reference("dive_fast.methods.run_config", RunConfig, [*_methods(), *_projections()])


if __name__ == "__main__":
    print(config_reference(), end="")
