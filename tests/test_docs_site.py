"""The site of the documentation: its navigation, its links, its notebook, and that it loads nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT

DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "quickstart.ipynb"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SITE = tool("docs_site")
#: Paths in the repository of all pages.
PAGES = sorted({*SITE.PAGES, *(str(page.relative_to(ROOT)) for page in DOCS.rglob("*.md"))})
#: Pages that are only read in the repository.
OTHERS = {
    str(page.relative_to(ROOT)) for pattern in ("*.md", "*/README.md", "examples/*/*.md") for page in ROOT.glob(pattern)
}


def leaves(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    else:
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(branch)


def anchors(path: str) -> set[str]:
    """The anchors of a page's headings."""
    text = "".join(part for is_text, part in SITE.prose(SITE.content(path)) if is_text)
    return {SITE.anchor(title) for title in re.findall(r"^#+ +(.+?) *$", text, re.M)}


def test_the_navigation_has_every_page_once() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    aside = [line.strip("/") for line in settings["not_in_nav"].split() if line.endswith(".md")]
    assert sorted([*leaves(settings["nav"]), *aside]) == sorted(SITE.page_of(path) for path in PAGES)


@pytest.mark.parametrize("path", sorted({*PAGES, *OTHERS}))
def test_links_lead_to_files_and_headings(path: str) -> None:
    for target, place in SITE.targets(SITE.content(path)):
        other = SITE.linked(path, target)
        assert (ROOT / other).exists(), f"{path}: {target}"
        if place:
            assert place in anchors(other), f"{path}: {target}#{place}"


def test_an_anchor_is_the_one_that_github_makes() -> None:
    assert SITE.anchor("Table 2: FSQ against VQ, `rooms` at 32 x 32") == "table-2-fsq-against-vq-rooms-at-32-x-32"
    assert SITE.anchor("Task `coco_panoptic`") == "task-coco_panoptic"


def test_links_out_of_the_documentation_lead_to_pages_of_the_site() -> None:
    text = "[data](../datasets/README.md#nyu) [code](../uvim_fsq/cli.py) [a](b.md) [web](https://a.b/c)\n```\n[x](y)\n```\n"
    expected = "[data](data_sets.md#nyu) [code](files/uvim_fsq/cli.py.md) [a](b.md) [web](https://a.b/c)"
    assert SITE.with_links(text, "concepts.md") == expected + "\n```\n[x](y)\n```\n"
    assert SITE.with_links("[a](../../datasets/README.md)", "tutorials/depth.md") == "[a](../data_sets.md)"
    assert SITE.with_links("[a](docs/concepts.md#b)", "index.md") == "[a](concepts.md#b)"


def test_the_notebook_is_the_executed_script() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    written = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    assert written == list(tool("quickstart_notebook").CELLS), "run tools/quickstart_notebook.py docs/quickstart.ipynb"
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])


def test_the_notebook_is_small_and_names_no_place_of_the_machine_that_ran_it() -> None:
    text = NOTEBOOK.read_text()
    assert len(text) < 200_000
    printed = re.sub(r'"image/png": ".*?"', "", text)
    assert not re.search(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|Users|opt|var)\b|site-packages", printed)


@pytest.mark.slow
def test_the_site_is_built_with_strict_links_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    for name in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (uvim-fsq[docs])")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in [*pages, *(tmp_path / "site").rglob("*.css")]:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?([^\"' >]+)", text)
        loaded += re.findall(r"<link[^>]*\shref=[\"']?([^\"' >]+)", text)
        loaded += re.findall(r"(?:url\(|@import )[\"']?([^\"') ]+)", text) if page.suffix == ".css" else []
        elsewhere = [item for item in loaded if re.match(r"(https?:)?//", item)]
        assert not elsewhere, f"{page.name}: {elsewhere[:3]}"
