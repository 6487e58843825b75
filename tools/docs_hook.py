"""Hook of mkdocs: pages and files of the site that are outside of ``docs``.

CONTRIBUTING.md and CHANGELOG.md become pages, and every file that a page links to becomes a file of the site,
under its path in the repository. So the same relative links work on GitHub, in a checkout and on the site.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site, and their files in the repository."""
LINK = re.compile(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\((?!\w+:)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages, and all files that pages link to."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(REPOSITORY / source)))
    waiting = [file for file in files if file.src_uri.endswith(".md")]
    while waiting:
        source = _source(waiting.pop())
        for _, _, path, _ in LINK.findall(source.read_text(encoding="utf-8")):
            target = (source.parent / path).resolve()
            uri = _uri(target)
            if uri is None or not target.is_file() or files.get_file_from_path(uri):
                continue
            file = File.generated(config, uri, abs_src_path=str(target), inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(file)
            if uri.endswith(".md"):
                waiting.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Points relative links to the files of the site; a link to a folder becomes its text."""
    source = _source(page.file)
    folder = os.path.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        mark, text, path, anchor = match.groups()
        target = (source.parent / path).resolve()
        uri = _uri(target)
        if target.is_dir():
            return text
        if uri is None or not files.get_file_from_path(uri):
            return match[0]  # mkdocs reports it
        return f"{mark}[{text}]({os.path.relpath(uri, folder or '.')}{anchor or ''})"

    return LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Removes Sphinx's roles, which docstrings put before names in code."""
    return re.sub(r":(?:class|data|func|meth|mod):(?=<code>)", "", html)


def _source(file: File) -> Path:
    return Path(file.abs_src_path or "").resolve()


def _uri(target: Path) -> str | None:
    """Where a file of the repository is on the site; None for files elsewhere."""
    if not target.is_relative_to(REPOSITORY):
        return None
    path = target.relative_to(REPOSITORY).as_posix()
    pages = {source: page for page, source in PAGES.items()} | {"README.md": "index.md"}
    return pages.get(path, path.removeprefix("docs/"))
