"""File names and installed folders, which the import contracts do not check."""

import tomllib
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_no_two_modules_share_a_file_name() -> None:
    modules = [*(REPOSITORY / "dive_fast").rglob("*.py"), *(REPOSITORY / "kernels").rglob("*.py")]
    names = Counter(path.name for path in modules if path.name != "__init__.py")
    assert len(names) > 100
    assert [name for name, count in names.items() if count > 1] == []


def test_no_two_test_files_share_a_name() -> None:
    files = [path for folder in ("tests", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py")]
    names = Counter(path.name for path in files if path.name not in ("__init__.py", "conftest.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_every_folder_is_installed() -> None:
    packages = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in (REPOSITORY / "dive_fast").rglob("__init__.py")}
    names = {".".join(folder.relative_to(REPOSITORY).parts) for folder in folders}
    mapped = {"dive_fast.kernels", "dive_fast.launch"}
    # Folders of data files, which setuptools takes for packages without code.
    data = {"dive_fast.demo.model", "dive_fast.launch.configs"}
    assert sorted(packages) == sorted(names | mapped | data)
