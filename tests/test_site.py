"""The documentation as a site: it builds without a warning, and no page or link of it is lost."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import switchworks

pytest.importorskip("sphinx")
pytest.importorskip("furo")
pytest.importorskip("myst_parser")
ROOT = Path(__file__).parent.parent


class Links(HTMLParser):
    """The targets of a page's links and pictures, and the places in it that may be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and tag in ("a", "img") and value is not None:
                self.targets.append(value)
            if name == "id" and value is not None:
                self.places.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; a warning of Sphinx is an error."""
    folder = tmp_path_factory.mktemp("site") / "html"
    words = ["--builder", "html", "--conf-dir", "docs", "--fail-on-warning", "--quiet"]
    command = [sys.executable, "-m", "sphinx", *words, ".", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Links]:
    files = [page for page in site.rglob("*.html") if "_static" not in page.parts]
    return {page: Links(page.read_text(encoding="utf-8")) for page in files}


def local_targets(page: Path, links: Links) -> Iterator[tuple[Path, str]]:
    """(file, place in it) of each link that stays in the site."""
    for target in links.targets:
        parts = urlsplit(target)
        if not parts.scheme and not parts.netloc:
            path = unquote(parts.path)
            yield (page.parent / path).resolve() if path else page, unquote(parts.fragment)


@pytest.mark.slow
def test_no_link_of_the_site_is_dead(pages):
    dead = {
        (page.name, file.name, place)
        for page, links in pages.items()
        for file, place in local_targets(page, links)
        if not file.exists() or (place and file in pages and place not in pages[file].places)
    }
    assert not dead
    assert sum(len(links.targets) for links in pages.values()) > 1000


@pytest.mark.slow
def test_every_page_is_reached_from_the_first(site, pages):
    reached, waiting = set(), [site / "index.html"]
    while waiting:
        page = waiting.pop()
        if page in pages and page not in reached:
            reached.add(page)
            waiting += [file for file, _ in local_targets(page, pages[page])]
    generated = {site / name for name in ("search.html", "py-modindex.html", "genindex.html")}
    assert set(pages) - reached - generated == set()
    written = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]
    for page in written:
        assert (site / page.relative_to(ROOT)).with_suffix(".html") in reached


@pytest.mark.slow
def test_the_reference_has_every_public_name_and_the_texts_of_fields(site):
    page = (site / "docs" / "api.html").read_text(encoding="utf-8")
    for name in switchworks.__all__:
        assert re.search(rf'id="switchworks\.{name}"', page), name
    assert "alpha of equation (4)" in page
    packages = (site / "docs" / "api_packages.html").read_text(encoding="utf-8")
    assert 'id="switchworks.optim.OptimConfig"' in packages
    assert 'id="switchworks.model.RoutingConfig"' not in packages  # it stands on the other page


@pytest.mark.slow
def test_the_search_knows_words_of_pages_and_docstrings(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert '"docs/tutorials/own_text"' in index
    assert re.search(r"[,{]\"?capac\"?:", index)  # the stem of capacity
    assert "plot_load" in index


def test_the_page_of_public_names_lists_each_of_them():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\.\. auto(?:class|function):: (\w+)$", page, flags=re.MULTILINE)
    assert sorted(listed) == sorted(switchworks.__all__)


def test_the_page_of_packages_lists_each_that_has_a_face():
    page = (ROOT / "docs" / "api_packages.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\.\. automodule:: switchworks\.(\w+)$", page, flags=re.MULTILINE)
    faces = {file.parent.name for file in (ROOT / "switchworks").glob("*/__init__.pyi")}
    assert set(listed) == (faces | {"model"}) - {"cli"}
