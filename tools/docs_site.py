"""Hooks of mkdocs: the site holds the pages of docs/ and what they link to outside of it.

The pages are written for a reader of the repository, so they link to ../datasets/README.md, to source files and to
folders. Here these become pages of the site, and the links follow them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Files outside of docs/, and the notebook -> their page.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "datasets/README.md": "data_sets.md",
    "docs/quickstart.ipynb": "quickstart.md",
    "examples/camvid_segmentation/README.md": "camvid_segmentation.md",
    "examples/surface_normals/README.md": "surface_normals.md",
}
#: A link of Markdown: before its target, target, anchor with its #.
LINK = re.compile(r"(\]\()([^)#\s]*)((?:#[^)\s]*)?)(?=\))")
#: What begins an address that is no path: https:, mailto:, data:.
ADDRESS = re.compile("[a-z]+:")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash", ".sbatch": "bash", ".toml": "toml"}


def anchor(title: str, separator: str = "-") -> str:
    """The anchor of a heading, as GitHub makes it, so that links lead to the same place in both."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", separator)


def prose(markdown: str) -> Iterator[tuple[bool, str]]:
    """The parts of a page in order: (True, text outside of code blocks) or (False, a code block)."""
    for i, part in enumerate(re.split(r"(^ *```.*?^ *```[^\n]*$)", markdown, flags=re.M | re.S)):
        yield i % 2 == 0, part


def targets(markdown: str) -> Iterator[tuple[str, str]]:
    """(file or folder, anchor without #) of the links of a page to files; either may be empty."""
    for is_text, part in prose(markdown):
        for _, target, place in LINK.findall(part) if is_text else ():
            if not ADDRESS.match(target):
                yield target, place[1:]


def page_of(path: str) -> str:
    """The file of the site that shows a file or folder of the repository, given by its path in it."""
    if f"{path}/README.md" in PAGES:
        path = f"{path}/README.md"
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}.md"


def source_of(uri: str) -> str:
    """The path in the repository of what a page of the site shows; the opposite of `page_of`."""
    pages = {page: path for path, page in PAGES.items()}
    if uri in pages:
        return pages[uri]
    return uri.removeprefix("files/").removesuffix(".md") if uri.startswith("files/") else f"docs/{uri}"


def linked(path: str, target: str) -> str:
    """The path in the repository of a link's target on the page `path`."""
    return normpath(os.path.join(os.path.dirname(path), target)) if target else path


def with_links(markdown: str, uri: str) -> str:
    """The Markdown of the page `uri` with links that lead to pages of the site."""

    def follow(match: re.Match[str]) -> str:
        start, target, place = match.groups()
        if not target or ADDRESS.match(target):
            return match[0]
        return start + relpath(page_of(linked(source_of(uri), target)), os.path.dirname(uri) or ".") + place

    return "".join(LINK.sub(follow, part) if is_text else part for is_text, part in prose(markdown))


def file_page(path: str) -> str:
    """A page that shows a text file of the repository, or lists a folder."""
    if (ROOT / path).is_dir():
        return "\n".join([f"# {path}", "", *(f"- `{item.name}`" for item in sorted((ROOT / path).iterdir()))])
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"# {path}\n\n````{language}\n{(ROOT / path).read_text()}\n````\n"


def notebook_page(notebook: dict[str, Any]) -> str:
    """A notebook (the JSON of its file) as Markdown: its cells, the text they printed and the pictures they drew."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})")
            else:
                parts.append(f"```text\n{''.join(output.get('text', data.get('text/plain', ''))).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def content(path: str) -> str:
    """The Markdown of the page that shows a file or folder of the repository."""
    if path.endswith(".ipynb"):
        return notebook_page(json.loads((ROOT / path).read_text()))
    return (ROOT / path).read_text() if path.endswith(".md") else file_page(path)


def outside(paths: Iterable[str]) -> list[str]:
    """Files and folders outside of docs/ that the pages `paths` link to, directly or through each other."""
    waiting, found = [*paths, *PAGES], dict.fromkeys(PAGES)
    while waiting:
        path = waiting.pop()
        if not path.endswith((".md", ".ipynb")):
            continue
        for target, _ in targets(content(path)):
            other = linked(path, target)
            other = f"{other}/README.md" if f"{other}/README.md" in PAGES else other
            if not other.startswith("docs/") and other not in found:
                if not (ROOT / other).exists():
                    raise FileNotFoundError(f"{path} links to {target}, which does not exist")
                found[other] = None
                waiting.append(other)
    return list(found)


def on_config(config: Any) -> Any:
    """Headings get GitHub's anchors; a function cannot be named in YAML without running code from it."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = anchor
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that show files from outside of docs/."""
    from mkdocs.structure.files import File  # type: ignore[import-not-found]

    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    for path in outside(pages):
        files.append(File.generated(config, page_of(path), content=content(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leads links to the pages of the site."""
    return with_links(markdown, page.file.src_uri)
