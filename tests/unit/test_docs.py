"""The documents: each link leads somewhere, each file that they name is there, and the list of keys is true."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from job import config

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)\)")
ROOMS = ("job", "launch", "configs", "tests", "docs", "benchmarks")
FILE = re.compile(rf"(?<![\w./~-])(?:{'|'.join(ROOMS)})/[\w./-]*\.(?:py|sh|sbatch|md|yaml|png|html)(?![\w*])")


def prose(document: Path) -> str:
    """The text without its blocks of code, in which brackets are no links and # is no heading."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^(?: {4}|\t).*$", "", text, flags=re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(document), flags=re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def broken_links(document: Path) -> list[str]:
    broken = []
    for link in LINK.findall(prose(document)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_within_the_project_leads_somewhere(document: Path) -> None:
    assert broken_links(document) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_names_is_there(document: Path) -> None:
    named = set(FILE.findall(document.read_text(encoding="utf-8")))
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_a_broken_link_or_anchor_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A heading, with `code` & more\n## Twice\n## Twice\n", encoding="utf-8")
    good = "[a](other.md) [b](other.md#a-heading-with-code--more) [c](other.md#twice-1) [d](https://example.com/x)"
    document = tmp_path / "page.md"
    document.write_text(f"{good}\n\n    [code](no-link.md)\n\n[e](gone.md) [f](other.md#gone) ![g](gone.png)\n")
    assert broken_links(document) == ["gone.md", "other.md#gone", "gone.png"]


def test_every_page_of_docs_can_be_reached_from_the_readme() -> None:
    reached, found = set(), [ROOT / "README.md"]
    while found:
        document = found.pop()
        reached.add(document)
        links = (link.partition("#")[0] for link in LINK.findall(prose(document)))
        pages = ((document.parent / link).resolve() for link in links if link.endswith(".md") and ":" not in link)
        found += [page for page in pages if page not in reached]
    assert [page.name for page in DOCUMENTS if page not in reached] == []


def test_the_readme_is_read_in_three_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_list_of_keys_is_the_one_of_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/else")
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == config.page(), "run `make docs`"
