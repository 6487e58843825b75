"""Documents name only paths, modules, config keys, commands and options that exist."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import dive_fast
from dive_fast.commands.console import ALIASES, ON_SEVERAL_GPUS
from dive_fast.config.section import sections
from dive_fast.errors import ConfigError
from dive_fast.methods import registry
from dive_fast.methods.run_config import RunConfig, load_run_config
from dive_fast.projections import rules as projections
from dive_fast.sweep.grid import split_values

REPOSITORY = Path(__file__).parents[1]
TOP = ("benchmarks", "dive_fast", "docs", "examples", "kernels", "launch", "tests", "tools")
SECTIONS = ("data", "evaluate", "model", "objective", "projection", "teacher", "train")
SUFFIXES = ("json", "jsonl", "md", "npy", "png", "py", "safetensors")
PATH = re.compile(rf"(?<![\w./<-])(?:{'|'.join(TOP)})/[\w./<>*-]*[\w/>*]")
MODULE = re.compile(r"(?<![\w./])dive_fast(?:\.\w+)+")
KEY = re.compile(rf"(?<![\w./-])(?:{'|'.join(SECTIONS)})(?:\.(?:\w+|<name>))+")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
SCRIPT = re.compile(r"(?<![\w/])((?:launch|benchmarks)/\w+\.py|dive-fast [a-z]+)(.*)")
OVERRIDE = re.compile(rf"(?:{'|'.join(SECTIONS)})\.[\w.]+=\S+")
CODE = re.compile(r"`([^`]+)`|^ {4}(.*)$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
OTHERS_OPTIONS = {
    *("--bind_cores_to_rank", "--ipc", "--master_addr", "--node_rank", "--num_accelerators", "--shm-size"),
    *("--gpus-per-node", "--gpus-per-task", "--kill-on-bad-exit", "--module", "--num_gpus", "--wait"),
}
"""Options of DeepSpeed's launcher, containers and Slurm."""


@cache
def documents() -> tuple[Path, ...]:
    """All documents but the changelog, which names what is gone."""
    paths = [*REPOSITORY.glob("*.md"), *(path for folder in TOP for path in (REPOSITORY / folder).rglob("*.md"))]
    return tuple(sorted(path for path in paths if path.name != "CHANGELOG.md"))


def commands(text: str) -> Iterator[tuple[str, str]]:
    """The scripts and commands in code, each with the arguments after it; continued lines are joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for code in CODE.finditer(joined):
        for script, arguments in SCRIPT.findall(" ".join((code[1] or code[2] or "").split())):
            yield script, arguments.partition(" #")[0]


def missing_paths(text: str, folder: Path) -> set[str]:
    """Paths that exist neither in the repository nor next to the document; ``<name>`` stands for any name."""
    paths = {re.sub(r"<\w+>", "*", path).rstrip("/") for path in PATH.findall(text)}
    return {path for path in paths if not any(any(base.glob(path)) for base in (REPOSITORY, folder))}


def broken_links(text: str, document: Path) -> set[str]:
    """Relative links whose file or heading does not exist."""
    broken = set()
    for path, anchor in LINK.findall(text):
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.add(f"{path}#{anchor}" if anchor else path)
    return broken


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_names(text: str) -> set[str]:
    """Dotted names below ``dive_fast`` that are neither modules nor attributes of one."""
    return {name for name in MODULE.findall(text) if not _exists(name.split("."))}


def _exists(parts: list[str]) -> bool:
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            if not hasattr(value, attribute):
                return False
            value = getattr(value, attribute)
        return True
    return False


@cache
def valid_keys() -> frozenset[str]:
    """All config keys, with the options of methods and ``<name>`` for names that the user chooses."""
    keys = set()
    for place, section in sections(RunConfig, ""):
        keys |= {place, *(f"{place}.{key}".lstrip(".") for key in section.model_fields)}
    for preset in registry.table().presets.values():
        keys |= {f"objective.{option}" for option in registry.options_of(preset)}
    for rule in projections.table().values():
        keys |= {f"projection.{option}" for option in rule.Options.model_fields}
    for half in registry.HALVES:
        parts = getattr(registry.table(), f"{half}s").values()
        keys |= {f"objective.{half}.{key}" for part in parts for key in ("name", *part.Options.model_fields)}
    return frozenset(keys)


def missing_keys(text: str) -> set[str]:
    """Names of the form ``section.key`` in code that are not config keys."""
    code = [match[1] or match[2] or "" for match in CODE.finditer(text)]
    keys = {key for part in code for key in KEY.findall(part) if not key.endswith(SUFFIXES)}
    return keys - valid_keys()


def source_of(script: str) -> Path:
    """The file that reads the options of a script or command."""
    command = re.fullmatch(r"(?:dive-fast |launch/)(\w+)(?:\.py)?", script)
    if command is None:
        return REPOSITORY / script
    return REPOSITORY / f"dive_fast/commands/{ALIASES.get(command[1], (command[1],))[0]}.py"


@cache
def options_of(file: Path) -> frozenset[str]:
    """The command-line options that a file defines."""
    return frozenset(re.findall(r'"(--[a-z][\w-]*)"', file.read_text(encoding="utf-8")))


def missing_options(text: str) -> set[str]:
    """Options of commands that their scripts lack, and options alone in code that no command has."""
    shared = options_of(REPOSITORY / "dive_fast/commands/cli.py") | options_of(
        REPOSITORY / "benchmarks/conftest.py"
    )
    missing = set()
    for script, arguments in commands(text):
        if (source := source_of(script)).exists():
            unknown = set(OPTION.findall(arguments)) - options_of(source) - shared
            if script.removeprefix("dive-fast ") in ON_SEVERAL_GPUS:
                unknown -= {"--gpus"}
            missing |= {f"{script} {option}" for option in unknown}
        elif script.startswith("dive-fast"):
            missing.add(script)
    scripts = [*REPOSITORY.glob("dive_fast/commands/*.py"), *REPOSITORY.glob("benchmarks/**/*.py")]
    known = OTHERS_OPTIONS.union(*(options_of(script) for script in scripts))
    return missing | (set(re.findall(r"`(--[a-z][\w-]*)", text)) - known)


def refused_overrides(text: str) -> set[str]:
    """Overrides in commands that the named config refuses."""
    refused = set()
    for script, arguments in commands(text):
        config, overrides = re.search(r"--config (\w+\.json)", arguments), OVERRIDE.findall(arguments)
        runs = [overrides]
        if "--over " in arguments:
            values = {key: split_values(text) for key, _, text in (item.partition("=") for item in overrides)}
            runs = [[f"{key}={texts[end]}" for key, texts in values.items()] for end in (0, -1)]
        try:
            for chosen in runs if config else ():
                load_run_config(config[1], chosen, REPOSITORY / "launch/configs")
        except ConfigError as error:
            refused.add(f"{script}{arguments}: {error}")
    return refused


def missing_targets(text: str) -> set[str]:
    """Targets of ``make`` in code that the Makefile lacks."""
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = {name for line in re.findall(r"^([\w -]+):(?!=)", makefile, re.MULTILINE) for name in line.split()}
    named = {
        name for match in CODE.finditer(text) for name in re.findall(r"^make ([\w-]+)", match[1] or match[2] or "")
    }
    return named - targets


def mistakes(text: str, document: Path) -> list[str]:
    """All names in a document that do not exist."""
    return sorted(
        missing_paths(text, document.parent)
        | broken_links(text, document)
        | missing_names(text)
        | missing_keys(text)
        | missing_options(text)
        | refused_overrides(text)
        | missing_targets(text)
    )


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_document_names_only_what_exists(document: Path) -> None:
    assert mistakes(document.read_text(encoding="utf-8"), document) == []


def test_documents_have_enough_names_to_check() -> None:
    text = "\n".join(document.read_text(encoding="utf-8") for document in documents())
    counts = [len(set(pattern.findall(text))) for pattern in (PATH, MODULE, KEY, OPTION, LINK)]
    assert all(count >= least for count, least in zip(counts, (70, 5, 30, 50, 30), strict=True)), counts
    assert len(list(commands(text))) > 30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see dive_fast/objective.py", "dive_fast/objective.py"),
        ("a file `tests/methods/<name>_of_it.py`", "tests/methods/*_of_it.py"),
        ("[guide](docs/guide.md)", "docs/guide.md"),
        ("[guide](docs/reliability.md#no-such-heading)", "docs/reliability.md#no-such-heading"),
        ("`dive_fast.evaluation.pairs.embed`", "dive_fast.evaluation.pairs.embed"),
        ("`train.epoch=1`", "train.epoch"),
        ("`objective.decoy`", "objective.decoy"),
        ("`evaluate.sets.<name>.paths`", "evaluate.sets.<name>.paths"),
        ("    python launch/evaluate.py --again\n", "launch/evaluate.py --again"),
        ("the option `--again`", "--again"),
        ("`make tests`", "tests"),
    ],
)
def test_wrong_name_is_a_mistake(text: str, expected: str) -> None:
    assert expected in mistakes(text, REPOSITORY / "README.md")


def test_refused_override_is_a_mistake() -> None:
    text = "    deepspeed launch/train.py --config vitb16_flyp.json objective.decay=0.9\n"
    assert any("unknown key objective.decay" in mistake for mistake in mistakes(text, REPOSITORY / "README.md"))


@pytest.mark.parametrize(
    "text",
    [
        "dive_fast/data/loaders/<name>.py, and dive_fast/teacher.",
        "`dive_fast.evaluation.geometry.measures.compare(before, after)`",
        "`evaluate.sets.<name>.path`, `train.epochs=1`, `objective.decay`, `model.safetensors`",
        "    deepspeed --hostfile hosts launch/train.py --config demo.json \\\n        train.max_steps=2 --json\n",
        "`make test`, [main job](#evidence)",
    ],
)
def test_existing_name_is_no_mistake(text: str) -> None:
    assert mistakes(text, REPOSITORY / "README.md") == []


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Files from outside of docs, at the links of a page; and the Python API.
    study = (tmp_path / "study/index.html").read_text(encoding="utf-8")
    (picture,) = set(re.findall(r'src="\.\./([^"]*cifar10-methods\.png)"', study))
    assert (tmp_path / picture).is_file()
    methods = (tmp_path / "methods/index.html").read_text(encoding="utf-8")
    assert not re.search(r'href="[^"]*CONTRIBUTING\.md', methods)
    page = (tmp_path / "api/index.html").read_text(encoding="utf-8")
    missing = [name for name in dive_fast.__all__ if name != "Config" and f">{name}</span>" not in page]
    assert missing == []
