"""The page of `headstart serve` in a real browser, sent and answered by the real server."""

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import headstart
from headstart.predict import load, predict_file
from tests.conftest import SMALL_ROWS, write_csv
from tests.real.conftest import CONTRASTS, DESK, HOSTILE_LABELS, HOSTILE_TEXTS, PHONE, check_fits, dress, events

pytestmark = pytest.mark.real
PAGE = Path(headstart.__file__).parent / "serve" / "page"
SECRET = "a-key-of-this-test"
LINES = ("the film was superb", "the hotel was awful", "the soup was not great")
TEXTS = (
    *("body", ".soft", ".score", "small", "label", "textarea", "#texts .start", ".status", ".facts dt", "summary"),
    *("pre code", ".summary .number", ".download", ".answers .text", ".best .number", ".why", ".legend", ".unread"),
    *(".text .strength-3", ".against", "caption", "thead th", "td.number", "::file-selector-button"),
)

# --- the server


@contextlib.contextmanager
def serving(run: Path, log: Path, *options: str) -> Iterator[str]:
    """The address of a server of a run folder, which is stopped afterwards."""
    command = [sys.executable, "-m", "headstart.cli", "serve", str(run), "--port", "0", *options]
    with (
        open(log, "w") as errors,
        subprocess.Popen(command, stderr=errors, env={**os.environ, "TEST_KEY": SECRET}) as server,
    ):
        try:
            until = time.monotonic() + 120
            while not (found := re.search(r"^Serving +(http\S+)", log.read_text(), re.MULTILINE)):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.1)
            yield found[1] + "/"
        finally:
            server.send_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def served(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of a run with the labels 0 and 1."""
    with serving(tiny_run, tmp_path_factory.mktemp("served") / "log", "--precision", "fp32") as address:  # as predict
        yield address


def ask(address: str, path: str, inputs: Any) -> Any:
    """The server's answer, without the page."""
    request = urllib.request.Request(address + path, json.dumps({"inputs": inputs}).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


# --- what a person does


def until(browser: Any, condition: str, *given: Any, seconds: float = 30) -> None:
    """Wait for an expression of the page to hold."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, seconds).until(lambda _: browser.execute_script(f"return {condition}", *given), condition)


def visit(browser: Any, address: str, width: int = DESK, scheme: str = "light") -> None:
    """Open the page, and wait for the model to be described."""
    dress(browser, width, scheme)
    browser.get(address)
    until(browser, "document.querySelector('#facts dd')")


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def told(browser: Any, selector: str) -> str:
    """All text of an element, shown or not."""
    return str(browser.execute_script("return document.querySelector(arguments[0]).textContent", selector))


def score_lines(browser: Any, *lines: str) -> None:
    """Put lines in the field (as they are: a keyboard has not all characters), and press the button."""
    put = "document.querySelector('#lines').value = JSON.parse(arguments[0])"
    browser.execute_script(put, json.dumps("\n".join(lines)))  # selenium itself sends no half of a character
    find(browser, "#texts .start").click()
    until(browser, "!document.querySelector('#texts .result').hidden")


def explain_answer(browser: Any, place: int = 0) -> None:
    browser.find_elements("css selector", ".why")[place].click()
    until(browser, "!document.querySelectorAll('.explanation')[arguments[0]].hidden", place)


def choose_file(browser: Any, path: Path) -> None:
    find(browser, "#file").send_keys(str(path))


def wait_for_table(browser: Any) -> None:
    until(browser, "document.querySelector('#table .totals').checkVisibility()")


def drop_file(browser: Any, name: str, content: bytes) -> None:
    """Drop a file on the page, as a mouse would."""
    drop = """const [name, bytes] = arguments, data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], name));
      for (const kind of ["dragover", "drop"])
        document.querySelector(".zone").dispatchEvent(
          new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));"""
    browser.execute_script(drop, name, list(content))


def download(browser: Any, folder: Path, section: str) -> list[list[str]]:
    """The cells of what a section offers for download, which comes into a folder of its own in the given one."""
    place = folder / section
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(place)})
    find(browser, f"{section} .download").click()
    patience = time.monotonic() + 30
    while not (found := list(place.glob("*-scored.csv"))):
        assert time.monotonic() < patience
        time.sleep(0.05)
    with open(found[0], encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def check_quiet(browser: Any, address: str) -> None:
    """The page that is shown asked nobody but its server, opened no dialog, and the console is empty."""
    heard = events(browser)
    asked = [one["params"]["request"]["url"] for one in heard if one["method"] == "Network.requestWillBeSent"]
    assert asked, "the log does show requests"
    assert [url for url in asked if not url.startswith((address, "data:,"))] == []
    assert not [one for one in heard if one["method"] == "Page.javascriptDialogOpening"]
    assert browser.get_log("browser") == []


# --- the page as a whole


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, PHONE, DESK])
def test_it_fits_is_readable_and_asks_only_its_server(
    browser: Any, served: str, tmp_path: Path, width: int, scheme: str
) -> None:
    visit(browser, served, width, scheme)
    check_fits(browser, width)
    score_lines(browser, *LINES, "x" * 5000 + " and " * 100)
    for place in range(4):
        explain_answer(browser, place)
    browser.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
    choose_file(browser, write_csv(tmp_path / "small.csv", SMALL_ROWS))
    wait_for_table(browser)
    check_fits(browser, width)
    contrasts = browser.execute_script(CONTRASTS, TEXTS)
    assert set(TEXTS) - contrasts.keys() <= {"::file-selector-button"}
    assert {kind: ratio for kind, ratio in contrasts.items() if ratio < 4.5} == {}
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 128")
    assert dark == (scheme == "dark")
    check_quiet(browser, served)


def test_it_says_which_model_it_is_and_how_good(browser: Any, served: str, tiny_run: Path) -> None:
    visit(browser, served)
    tested = json.loads((tiny_run / "metrics.json").read_text())["test"]
    low, high = tested["accuracy_ci95"]
    said = f"{tested['accuracy']:.3f} accuracy on {tested['n']} test texts, 95% interval {low:.3f} to {high:.3f}"
    assert told(browser, "h1") == tiny_run.name
    assert told(browser, "#score") == said
    assert told(browser, "#facts").startswith("Labels0, 1Readsat most ")
    assert browser.title == f"{tiny_run.name}: headstart"


def test_every_control_has_a_name_and_every_part_a_landmark(browser: Any, served: str, tmp_path: Path) -> None:
    visit(browser, served)
    score_lines(browser, *LINES)
    explain_answer(browser)
    choose_file(browser, write_csv(tmp_path / "small.csv", SMALL_ROWS))
    wait_for_table(browser)
    browser.execute_script("for (const one of document.querySelectorAll('.running')) one.hidden = false")
    browser.execute_cdp_cmd("Accessibility.enable", {})
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named: dict[str, list[str]] = {}
    for node in tree:
        if not node.get("ignored"):
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert named.keys() >= {"banner", "main", "complementary", "status", "progressbar", "region"}
    for role in ("button", "textbox", "combobox", "progressbar", "link", "region", "complementary"):
        assert named[role], role
        assert all(named[role]), role
    assert "Why? the film was superb" in named["button"]
    assert [int(level) for level in re.findall(r"<h(\d)", browser.page_source)][:2] == [1, 2]


def test_nothing_moves(browser: Any, served: str) -> None:
    visit(browser, served)
    moving = """return [...document.querySelectorAll("*")].map(node => getComputedStyle(node))
      .filter(style => style.transitionDuration !== "0s" || style.animationName !== "none").length"""
    assert browser.execute_script(moving) == 0


def test_its_script_writes_no_markup() -> None:
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage|cookie", script)
    markup = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r'\s(style|on\w+)="', markup), "which the Content-Security-Policy would refuse"


# --- typed texts


def test_a_text_gets_the_probabilities_of_the_server_as_bars(browser: Any, served: str) -> None:
    visit(browser, served)
    score_lines(browser, LINES[0])
    answer = ask(served, "predict", LINES[0])
    bars = browser.execute_script("""return [...document.querySelectorAll(".best li")].map(item => {
      const [name, bar, fill, number] = [".name", ".bar", ".fill", ".number"].map(part => item.querySelector(part));
      return [name.textContent, number.textContent, fill.offsetWidth / bar.offsetWidth];
    })""")
    assert [(name, number) for name, number, _ in bars] == [(one["label"], f"{one['score']:.3f}") for one in answer]
    assert [width for *_, width in bars] == pytest.approx([one["score"] for one in answer], abs=0.01)
    assert told(browser, "#texts .status") == f"{answer[0]['label']}, with a confidence of {answer[0]['score']:.3f}."


def test_a_line_is_a_text(browser: Any, served: str, tmp_path: Path) -> None:
    visit(browser, served)
    score_lines(browser, LINES[0], "", "  ", *LINES[1:])
    answers = ask(served, "predict", [[line] for line in LINES])
    shown = browser.execute_script("""return [...document.querySelectorAll(".answers > li")].map(item => [
      item.querySelector(".text").textContent, item.querySelector(".name").textContent])""")
    assert shown == [[line, answer[0]["label"]] for line, answer in zip(LINES, answers, strict=True)]
    assert told(browser, "#texts .status").startswith("3 texts scored: ")
    header, *rows = download(browser, tmp_path, "#texts")
    assert header == ["text", "prediction", "confidence", "p_0", "p_1"]
    assert [row[:2] for row in rows] == shown


def test_more_lines_than_are_shown_or_fit_a_request(browser: Any, served: str, tmp_path: Path) -> None:
    visit(browser, served)
    score_lines(browser, *(f"the film number {number} was great" for number in range(120)))
    assert len(browser.find_elements("css selector", ".answers > li")) == 50
    assert told(browser, ".more") == "70 more texts: the download has all."
    assert len(download(browser, tmp_path, "#texts")) == 121


def test_no_text_is_no_request(browser: Any, served: str) -> None:
    visit(browser, served)
    find(browser, "#texts .start").click()
    assert told(browser, "#texts .status") == "There is no text to score yet."
    assert browser.switch_to.active_element.get_attribute("id") == "lines"


def test_words_are_marked_by_their_influence(browser: Any, served: str) -> None:
    visit(browser, served)
    text = "\U0001f600\U0001f600 the film was superb, and the hotel awful \U0001f600 " + "very " * 100
    score_lines(browser, text)
    explain_answer(browser)
    assert told(browser, ".answers .text") == text.strip(), "places count characters, also beyond 16 bits"
    found = ask(served, "explain", text)["words"]
    read = [word for word in found if word["score"] is not None]
    rows = browser.execute_script("""return [...document.querySelectorAll(".explanation tbody tr")]
      .map(row => [...row.children].map(cell => cell.textContent))""")
    assert [word for word, _ in rows] == [word["word"] for word in found]
    scores = [float(score.replace("\N{MINUS SIGN}", "-")) for _, score in rows if score != "not read"]
    assert scores == pytest.approx([word["score"] for word in read], abs=0.011)
    assert len(browser.find_elements("css selector", ".text .unread")) == len(found) - len(read) > 0
    strongest = max(read, key=lambda word: abs(word["score"]))
    marked = find(browser, ".text .strength-3")
    assert strongest["word"] in [one.text for one in browser.find_elements("css selector", ".text .strength-3")]
    assert marked.value_of_css_property("border-bottom-style") in ("solid", "dashed"), "not by colour alone"
    assert "speaks for" in told(browser, ".legend")
    assert "it most: " in told(browser, ".answers .status")
    find(browser, ".why").click()
    assert not find(browser, ".explanation").is_displayed()
    assert browser.find_elements("css selector", ".text .strength-3") == []


# --- tables

ROWS = (
    *(("1", LINES[0], "-3"), ("2", "", "+4,5"), ("3", 'the "hotel",\nwas; awful\t', "=1+1"), ("4", " \t ", "@x")),
    *(
        ("5", "=cmd|' /C calc'!A0", "-x"),
        ("6", "-5 stars", ""),
        ("7", "\u202e\U0001f600 the soup", "'"),
        ("8", "\x1c", ""),
    ),
    *((str(number), f"the film number {number} was great", "a") for number in range(9, 110)),
)


def table_bytes(delimiter: str, ends: str, mark: str = "") -> bytes:
    """A table with quotes, line breaks, blank texts and what a spreadsheet would compute."""

    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if re.search(f'["\n{delimiter}]', text) else text

    rows = [("id", " review ", "note"), *ROWS]
    return (mark + "".join(delimiter.join(map(cell, row)) + ends for row in rows)).encode()


def for_spreadsheets(cell: str) -> str:
    is_formula = re.match(r"[=+\-@\t\r]", cell) and not re.fullmatch(r"[+-]?[\d.,]+", cell)
    return f"'{cell}" if is_formula else cell


@pytest.mark.parametrize(
    ("name", "delimiter", "ends", "mark"),
    [
        ("comma.csv", ",", "\n", ""),
        ("excel.csv", ";", "\r\n", "\ufeff"),
        ("tab.tsv", "\t", "\n", ""),
        ("pipe.csv", "|", "\r\n", ""),
    ],
)
def test_a_dropped_table_is_scored_as_predict_does(
    browser: Any, served: str, tiny_run: Path, tmp_path: Path, name: str, delimiter: str, ends: str, mark: str
) -> None:
    content = table_bytes(delimiter, ends, mark)
    visit(browser, served)
    drop_file(browser, name, content)
    wait_for_table(browser)
    (tmp_path / name).write_bytes(content)
    predict_file(load(tiny_run, device="cpu"), str(tmp_path / name), str(tmp_path / "expected.csv"))
    with open(tmp_path / "expected.csv", encoding="utf-8", newline="") as file:
        expected = list(csv.reader(file))
    found = download(browser, tmp_path, "#table")
    assert found[0] == expected[0] == ["id", "review", "note", "prediction", "confidence", "p_0", "p_1"]
    assert len(found) == len(expected)
    for mine, its in zip(found[1:], expected[1:], strict=True):
        assert mine[:4] == [for_spreadsheets(cell) for cell in its[:4]]
        assert [cell and float(cell) for cell in mine[4:]] == pytest.approx(
            [cell and float(cell) for cell in its[4:]], abs=1e-6
        )
    blank = sum(not text.strip() for _, text, _ in ROWS)
    assert told(browser, "#table .status").endswith(f". {blank} rows without text got no label.")
    assert told(browser, "caption") == f"{name}: the first 10 of {len(ROWS)} rows"
    counts = [int(number) for number in re.findall(r"(\d+) \(", told(browser, "#table .summary"))]
    assert sum(counts) == len(ROWS) - blank
    check_quiet(browser, served)


def test_a_table_that_was_scored_before_keeps_one_prediction(browser: Any, served: str, tmp_path: Path) -> None:
    rows = [("x", LINES[0], "y"), ("", LINES[1])]
    visit(browser, served)
    choose_file(browser, write_csv(tmp_path / "again.csv", rows, "prediction", "text", "p_1"))
    wait_for_table(browser)
    header, *scored = download(browser, tmp_path, "#table")
    assert header == ["prediction", "text", "p_1", "confidence", "p_0"]
    assert {row[0] for row in scored} <= {"0", "1"}
    assert all(float(row[2]) + float(row[4]) == pytest.approx(1) for row in scored)


def test_long_texts_go_in_requests_that_the_server_takes(browser: Any, served: str, tmp_path: Path) -> None:
    rows = [(f"{number} " + "the film was great " * size,) for number, size in enumerate([5_000] * 40 + [30_000] * 3)]
    visit(browser, served)
    choose_file(browser, write_csv(tmp_path / "long.csv", rows, "text"))
    until(browser, "!/^(Reading|Scoring)/.test(document.querySelector('#table .status').textContent)", seconds=60)
    assert told(browser, "#table .status").startswith("43 rows scored: ")
    check_quiet(browser, served)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "The file is empty."),
        (b" \n\n", "The file is empty."),
        (b"text,label\n", "The file has a header and no rows."),
        (b'text,id\na,1\n"b,2\n', "Row 3 opens a quote that is never closed."),
        (b'text,id\n"a "b" c",1\n', "Row 2 has a lone quote."),
        (b"text,id\na,1\nb,c,2\n", "More fields than the header's 2: row 3."),
        (b"text,id,text\na,1,2\n", "The column 'text' appears twice."),
        ("text\ncaf\xe9\n".encode("latin-1"), "The file is not UTF-8; probably latin-1."),
        ("text\ncafé\n".encode("utf-16"), "The file is UTF-16, not UTF-8."),
        (b"text\na\0b\n", "The file has a NUL byte"),
        (b"text,id\ra,1\r", "The file's lines end as on an old Mac."),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_in_words(browser: Any, served: str, content: bytes, said: str) -> None:
    visit(browser, served)
    drop_file(browser, "table.csv", content)
    until(browser, "document.querySelector('#table .status.problem')")
    assert told(browser, "#table .status").startswith(said)
    assert not find(browser, "#table .result").is_displayed()
    drop_file(browser, "table.xlsx", b"PK")
    until(browser, "document.querySelector('#table .status').textContent.includes('Excel')")
    drop_file(browser, "mended.csv", b"text\nthe film was superb\n")
    wait_for_table(browser)
    check_quiet(browser, served)


def test_a_person_names_the_column_where_none_is_known(browser: Any, served: str, tmp_path: Path) -> None:
    rows = [("the hotel was awful", "the film was superb")] * 3
    visit(browser, served)
    choose_file(browser, write_csv(tmp_path / "odd.csv", rows, "<b>title</b>", "body"))
    until(browser, "document.activeElement.id === 'column'")
    assert told(browser, "#table .status").startswith("odd.csv: 3 rows. Which column has the text?")
    assert not find(browser, "#table .start").is_displayed()
    browser.switch_to.active_element.send_keys("b")
    until(browser, "document.querySelector('#table .start').checkVisibility()")
    browser.switch_to.active_element.send_keys("\t\n")
    wait_for_table(browser)
    assert told(browser, "#table tbody th") == "the film was superb"
    assert told(browser, "#column") == "choose a column<b>title</b>body"


def test_scoring_can_be_cancelled_and_gone_on_with(browser: Any, served: str, tmp_path: Path) -> None:
    rows = [(f"the film number {number} was great",) for number in range(700)]
    visit(browser, served)
    slow = {"offline": False, "latency": 250, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", slow)
    try:
        choose_file(browser, write_csv(tmp_path / "long.csv", rows, "text"))
        until(browser, "document.querySelector('#table progress').value > 90")
        assert re.fullmatch(r"\d+ of 700 rows", told(browser, "#table .told"))
        find(browser, "#table .cancel").send_keys("\n")
        until(browser, "document.querySelector('#table .status').textContent.startsWith('Cancelled after ')")
        assert not find(browser, "#table .running").is_displayed()
        assert not find(browser, "#table .totals").is_displayed()
        left = int(re.findall(r"\d+", find(browser, "#table .start").text)[0])
        assert 0 < left < 700
        assert told(browser, "#table .status") == f"Cancelled after {700 - left} of 700 rows."
        assert browser.switch_to.active_element.get_attribute("class") == "status", "where what happened is said"
    finally:
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", {**slow, "latency": 0})
    find(browser, "#table .start").click()
    wait_for_table(browser)
    assert len(download(browser, tmp_path, "#table")) == 701


def test_a_new_file_takes_the_place_of_one_that_is_being_scored(browser: Any, served: str, tmp_path: Path) -> None:
    rows = [(f"the film number {number} was great",) for number in range(700)]
    visit(browser, served)
    choose_file(browser, write_csv(tmp_path / "first.csv", rows, "text"))
    choose_file(browser, write_csv(tmp_path / "second.csv", rows[:3], "text"))
    until(browser, "document.querySelector('caption').textContent === 'second.csv: 3 rows'")
    wait_for_table(browser)
    time.sleep(0.5)
    assert told(browser, "#table .status").startswith("3 rows scored")
    assert len(download(browser, tmp_path, "#table")) == 4


# --- by keyboard alone


def test_all_of_it_works_by_keyboard(browser: Any, served: str, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains, Keys

    def press(*keys: str) -> None:
        ActionChains(browser).send_keys(*keys).perform()

    def focused() -> Any:
        node = browser.switch_to.active_element
        assert node.value_of_css_property("outline-style") != "none", node.get_attribute("outerHTML")
        return node

    def tab_to(selector: str) -> Any:
        for _ in range(12):
            press(Keys.TAB)
            if focused().get_attribute("outerHTML") == find(browser, selector).get_attribute("outerHTML"):
                return focused()
        raise AssertionError(f"{selector} is not reached")

    visit(browser, served)
    tab_to("#lines")
    press(LINES[0], Keys.ENTER, LINES[1])
    ActionChains(browser).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    until(browser, "document.querySelectorAll('.answers > li').length === 2")
    tab_to("#texts .start")
    tab_to("#texts .download")
    tab_to(".why")
    press(Keys.ENTER)
    until(browser, "!document.querySelector('.explanation').hidden")
    assert focused().get_attribute("aria-expanded") == "true"
    tab_to(".explanation summary")
    press(Keys.ENTER)
    assert find(browser, ".explanation tbody tr").is_displayed()
    tab_to("#file").send_keys(str(write_csv(tmp_path / "small.csv", SMALL_ROWS)))
    wait_for_table(browser)
    tab_to("#column")
    tab_to("#table .download")
    tab_to("aside summary")
    press(Keys.SPACE)
    assert served + "predict" in told(browser, "#curl")


# --- what the server refuses


def test_a_key_is_asked_for_and_kept_nowhere(browser: Any, tiny_run: Path, tmp_path: Path) -> None:
    with serving(tiny_run, tmp_path / "log", "--api-key-env", "TEST_KEY") as address:
        dress(browser, PHONE)
        browser.get(address)
        until(browser, "document.querySelector('#key-form').checkVisibility()")
        check_fits(browser, PHONE)
        assert told(browser, "#status") == "This server asks for its API key."
        assert find(browser, "#key").accessible_name == "API key"
        browser.switch_to.active_element.send_keys("wrong\n")
        until(browser, "document.querySelector('#status').textContent === 'The server does not accept this API key.'")
        browser.switch_to.active_element.send_keys(SECRET + "\n")
        until(browser, "document.querySelector('#facts dd')")
        assert not find(browser, "#key-form").is_displayed()
        assert told(browser, "#status") == ""
        score_lines(browser, LINES[0])
        kept = (
            "return [localStorage.length, sessionStorage.length, document.cookie, document.querySelector('#key').value]"
        )
        assert browser.execute_script(kept) == [0, 0, "", ""]
        assert SECRET not in browser.page_source
        assert {entry["source"] for entry in browser.get_log("browser")} == {"network"}, "Chromium's own, of the 401s"
        browser.refresh()
        until(browser, "document.querySelector('#key-form').checkVisibility()")


def test_a_busy_server_is_waited_for_and_an_unsure_one_abstains(browser: Any, tiny_run: Path, tmp_path: Path) -> None:
    options = ("--min-confidence", "1", "--max-waiting", "40")
    with serving(tiny_run, tmp_path / "log", *options) as address:
        visit(browser, address)
        choose_file(browser, write_csv(tmp_path / "table.csv", [(f"the film was {n}",) for n in range(200)], "text"))
        until(browser, "document.querySelector('#table .status').textContent.startsWith('The server is busy; ')")
        wait_for_table(browser)
        assert told(browser, "#table .status") == "200 rows scored: 200 abstain."
        header, *rows = download(browser, tmp_path, "#table")
        assert header == ["text", "prediction", "confidence", "p_0", "p_1"]
        assert {row[1] for row in rows} == {"abstain"}
        assert all(float(row[2]) == max(map(float, row[3:])) for row in rows)
        score_lines(browser, LINES[0])
        assert told(browser, ".verdict") == "abstain: no label has a probability of 1"
        assert len(browser.find_elements("css selector", ".best li")) == 2


def test_a_server_that_is_gone_is_told_of(browser: Any, tiny_run: Path, tmp_path: Path) -> None:
    with serving(tiny_run, tmp_path / "log") as address:
        visit(browser, address)
    find(browser, "#lines").send_keys(LINES[0])
    find(browser, "#texts .start").click()
    until(browser, "document.querySelector('#texts .status.problem')")
    assert told(browser, "#texts .status") == "The server does not answer. Is headstart serve still running?"
    assert find(browser, "#lines").get_property("value") == LINES[0]


# --- texts and labels that would like to run


@pytest.fixture(scope="module")
def hostile_page(browser: Any, hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of a model with hostile labels, with hostile texts in every part of it."""
    folder = tmp_path_factory.mktemp("hostile-page")
    with serving(hostile, folder / "log") as address:
        visit(browser, address, PHONE)
        score_lines(browser, *HOSTILE_TEXTS, "a\0b\x1b[31m", "\ud83d lone")
        for place in range(len(HOSTILE_TEXTS) + 2):
            explain_answer(browser, place)
        rows = [(text, "x") for text in HOSTILE_TEXTS]
        drop_file(
            browser,
            "<img src=x onerror=window.hacked=1>\u202e.csv",
            write_csv(folder / "table.csv", rows, "text", "</option><script>window.hacked=1</script>").read_bytes(),
        )
        wait_for_table(browser)
        yield address


def test_nothing_hostile_runs_or_is_asked_for(browser: Any, hostile_page: str) -> None:
    assert browser.execute_script("return window.hacked") is None
    check_fits(browser, PHONE)
    added = "return document.querySelectorAll('img, iframe, object, base, svg, b, body script, [onerror]').length"
    assert browser.execute_script(added) == 0
    check_quiet(browser, hostile_page)


def test_what_is_hostile_is_shown_as_it_is(browser: Any, hostile_page: str) -> None:
    texts, labels, options = browser.execute_script("""
      const words = nodes => [...nodes].map(node => node.textContent);
      return [".answers .text", ".best .name", "#column option"].map(one => words(document.querySelectorAll(one)))""")
    for text in HOSTILE_TEXTS:
        assert any(shown.startswith(text[:1000]) for shown in texts), text[:80]
    assert {label[:80] for label in labels} == {label[:80] for label in HOSTILE_LABELS}
    assert options == ["text", "</option><script>window.hacked=1</script>"]
    outside = """return [...document.querySelectorAll("body *")].filter(node => !node.closest("bdi, textarea, option")
      && [...node.childNodes].some(one => one.nodeType === 3 && one.data.includes("\\u202e"))).length"""
    assert browser.execute_script(outside) == 0, "what turns the direction of reading stays in its <bdi>"


def test_no_cell_of_a_hostile_download_is_a_formula(browser: Any, hostile_page: str, tmp_path: Path) -> None:
    for section in ("#texts", "#table"):
        cells = [cell for row in download(browser, tmp_path, section) for cell in row]
        assert any("cmd|" in cell for cell in cells), "there are some that would be"
        assert [cell for cell in cells if for_spreadsheets(cell) != cell] == []
