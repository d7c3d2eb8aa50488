"""Shared by the tests in a real browser: the browser, what it tells of a page, and data that would like to run."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headstart import judge
from headstart.config import settings
from headstart.run import train
from tests.conftest import write_csv

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run", "--disable-default-apps"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)
PHONE, DESK = 390, 1280  # pixels across
HOSTILE_LABELS = (
    "=cmd|' /C calc'!A0",
    "<script>window.hacked=1</script>",
    '"><svg onload=window.hacked=1>\u202e' + "l" * 500,
    "' autofocus onfocus=window.hacked=1 x='",
)
HOSTILE_TEXTS = (
    "<script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    '"><svg onload=window.hacked=1>',
    "</title></style></svg><iframe src=http://127.0.0.1:9/></iframe><script>alert(1)</script>",
    "{{ 7*7 }} {% raw %} ${7*7}",
    "\u202etfel ot thgir\u202e",
    "=cmd|' /C calc'!A0",
    "@SUM(1+1)*cmd|' /C calc'!A0",
    "# heading **bold** [link](javascript:window.hacked=1) | cell |",
    "x" * 20_000,
)

CONTRASTS = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const light = colors => {
  for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(one => one / 255)
    .map(one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
    .reduce((sum, one, i) => sum + one * [0.2126, 0.7152, 0.0722][i], 0);
};
const behind = node => node ? [...behind(node.parentElement), getComputedStyle(node).backgroundColor] : ["white"];
return Object.fromEntries(arguments[0].map(name => [name, document.querySelector(name)]).filter(([, node]) => node)
  .map(([name, node]) => {
    const style = getComputedStyle(node), color = node.closest("svg") ? style.fill : style.color;
    const [less, more] = [light(behind(node)), light([...behind(node), color])].sort((a, b) => a - b);
    return [name, (more + 0.05) / (less + 0.05)];
  }));"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed (apt-get install chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SE_OFFLINE", "true")  # selenium's manager downloads nothing
        driver = webdriver.Chrome(options=options, service=Service(executable_path=DRIVER))
        yield driver
        driver.quit()


def dress(browser: Any, width: int, scheme: str = "light") -> None:
    """Give the next page a width and a colour scheme; what the browser logged before is forgotten."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for kind in ("browser", "performance"):
        browser.get_log(kind)


def events(browser: Any) -> list[dict[str, Any]]:
    """What DevTools reported since the page was opened."""
    return [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]


def check_fits(browser: Any, width: int) -> None:
    """The page that is shown does not scroll sideways (a telephone's innerWidth grows with what is too wide)."""
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, _session_cache: None) -> Path:
    """A run tested on each text with each label, so that most are mistakes, of which all are shown."""
    folder, draw = tmp_path_factory.mktemp("hostile"), random.Random(0)
    rows = [(f"{text} {number}", draw.choice(HOSTILE_LABELS)) for text in HOSTILE_TEXTS for number in range(16)]
    source = str(write_csv(folder / "=hostile <b>.csv", rows))
    tested = [(f"{text} {label[:9]}", label) for text in HOSTILE_TEXTS for label in HOSTILE_LABELS]
    test = str(write_csv(folder / "test.csv", tested))
    out = folder / "=run <script>window.hacked=1<"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "MISTAKES", 100)
        train(settings(source, test=test, model=str(tiny_bert), device="cpu", epochs=3, thaw="0", out=str(out)))
    return out
