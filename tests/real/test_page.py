"""report.html in a real browser: it asks nothing of a network, fits a telephone, is readable, and runs no data."""

import csv
from pathlib import Path
from typing import Any

import pytest

from headstart.config import settings
from headstart.run import train
from tests.conftest import BAD, GOOD, NOUNS, write_csv
from tests.real.conftest import CONTRASTS, DESK, HOSTILE_LABELS, HOSTILE_TEXTS, PHONE, check_fits, dress, events

pytestmark = pytest.mark.real

# --- what the browser tells of a page

FIGURES = """return [...document.querySelectorAll("svg")].map(svg => {
  const box = svg.getBoundingClientRect();
  const seen = svg.checkVisibility({opacityProperty: true, visibilityProperty: true});
  return {width: box.width, height: box.height, seen, role: svg.getAttribute("role"),
          name: svg.getAttribute("aria-label"), shapes: svg.querySelectorAll("path, rect, polyline, circle").length};
})"""

TEXTS = (
    "body",
    ".soft",
    "a",
    "caption",
    "thead th",
    "pre code",
    ".chart .tick",
    ".mistakes .soft",
    ".text .strength-3",
)


def show(browser: Any, run: Path, width: int, scheme: str = "light") -> None:
    """Open a run's page at a width and in a colour scheme."""
    dress(browser, width, scheme)
    browser.get((run / "report.html").as_uri())


def check_quiet(browser: Any, run: Path) -> None:
    """The page that is shown asked for nothing but itself, opened no dialog, and the console is empty."""
    heard = events(browser)
    asked = [one["params"]["request"]["url"] for one in heard if one["method"] == "Network.requestWillBeSent"]
    assert asked, "the log does show requests"
    assert {url for url in asked if url != "data:,"} == {(run / "report.html").as_uri()}
    assert not [one for one in heard if one["method"] == "Page.javascriptDialogOpening"]
    assert browser.get_log("browser") == []


# --- ordinary runs


def table(folder: Path, words: dict[str, tuple[str, ...]]) -> str:
    """Texts in which a word decides the label, but for one in seven, so that there are mistakes."""
    labels = list(words)
    rows = [(f"the {noun} was {word}", label) for label, some in words.items() for word in some for noun in NOUNS]
    mixed = [(text, labels[i % len(labels)] if i % 7 == 0 else label) for i, (text, label) in enumerate(rows)]
    return str(write_csv(folder / "table.csv", mixed))


@pytest.fixture(scope="module", params=["thawed", "article", "many labels"])
def ordinary(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, _session_cache: None
) -> Path:
    """A run with two stages and three labels; one by the article's recipe; one with so many labels that few fit."""
    folder = tmp_path_factory.mktemp("ordinary")
    words: dict[str, tuple[str, ...]] = {
        "good": GOOD,
        "bad": BAD,
        "so-so": ("not great", "not awful", "very not", "a battery"),
    }
    given: dict[str, Any] = {"thaw": "1", "epochs": 2}
    if request.param == "article":
        given = {"recipe": "article"}
    elif request.param == "many labels":
        words = {f"label {number}": (f"at {number}",) for number in range(24)}
        given = {"thaw": "0", "epochs": 3}
    out = str(folder / "run")
    train(settings(table(folder, words), model=str(tiny_bert), device="cpu", out=out, **given))
    return folder / "run"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_asks_for_nothing_and_fits(browser: Any, ordinary: Path, width: int, scheme: str) -> None:
    show(browser, ordinary, width, scheme)
    check_quiet(browser, ordinary)
    check_fits(browser, width)


def test_every_figure_is_drawn_and_named(browser: Any, ordinary: Path) -> None:
    for width in (PHONE, DESK):
        show(browser, ordinary, width)
        figures = browser.execute_script(FIGURES)
        assert len(figures) >= 12
        for figure in figures:
            assert figure["seen"], figure
            assert min(figure["width"], figure["height"]) > 8, figure
            assert figure["role"] == "img", figure
            assert figure["name"], figure
            assert figure["shapes"] > 0, figure


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(browser: Any, ordinary: Path, scheme: str) -> None:
    show(browser, ordinary, DESK, scheme)
    contrasts = browser.execute_script(CONTRASTS, [*TEXTS, ".matrix td.right", ".unread"])
    assert contrasts.keys() >= set(TEXTS)
    assert {kind: ratio for kind, ratio in contrasts.items() if ratio < 4.5} == {}
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 128")
    assert dark == (scheme == "dark")


def test_paper_is_white_and_has_everything(browser: Any, ordinary: Path) -> None:
    show(browser, ordinary, DESK, "dark")
    try:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        cut = "return [...document.querySelectorAll('.scroll')].filter(box => box.scrollHeight > box.clientHeight + 1)"
        assert browser.execute_script(cut) == []
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


# --- a data set that would like to run


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_in_the_data_runs_or_is_asked_for(browser: Any, hostile: Path, width: int) -> None:
    show(browser, hostile, width)
    assert browser.execute_script("return window.hacked") is None
    check_quiet(browser, hostile)
    check_fits(browser, width)


def test_the_data_adds_no_element_and_no_attribute(browser: Any, hostile: Path) -> None:
    show(browser, hostile, DESK)
    added = (
        "return document.querySelectorAll('script, img, iframe, object, base, form, input, b, svg:not([role])').length"
    )
    assert browser.execute_script(added) == 0
    handlers = """return [...document.querySelectorAll("*")].flatMap(node => node.getAttributeNames())
      .filter(name => name.startsWith("on") || name === "autofocus")"""
    assert browser.execute_script(handlers) == []
    policy = browser.execute_script("return document.querySelector('meta[http-equiv]').content")
    assert "default-src 'none'" in policy
    assert "script" not in policy


def test_the_data_is_shown_as_it_is_and_cut(browser: Any, hostile: Path) -> None:
    show(browser, hostile, PHONE)
    texts, names, longest = browser.execute_script("""
      const words = nodes => [...nodes].map(node => node.textContent);
      const all = words(document.querySelectorAll("bdi"));
      return [words(document.querySelectorAll(".mistakes .text")), all, Math.max(...all.map(one => one.length))]""")
    for text in HOSTILE_TEXTS:
        assert any(text[:400] in shown for shown in texts), text[:80]
    for label in HOSTILE_LABELS:
        assert any(name.startswith(label[:80]) for name in names), label[:80]
    assert longest <= 402
    outside = """return [...document.querySelectorAll("p, li, td, th, figcaption, h1, dd, code")]
      .filter(node => [...node.childNodes].some(one => one.nodeType === 3 && one.data.includes("\\u202e"))).length"""
    assert browser.execute_script(outside) == 0, "what turns the direction of reading stays in its <bdi>"


def test_no_cell_of_the_predictions_is_a_formula(hostile: Path) -> None:
    with open(hostile / "predictions.csv", encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert any("cmd|" in cell for cell in cells), "there are some that would be"
    assert [cell for cell in cells if cell[:1] in ("=", "+", "-", "@") and not is_number(cell)] == []


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
