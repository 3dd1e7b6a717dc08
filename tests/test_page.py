"""report.html in a browser: it draws, answers to pointer and keys, and takes no text for markup."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from test_report import MARKUP, MakeRun, make_run, report

__all__ = ["make_run"]
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    tools = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in tools:
        assert "CI" not in os.environ, "chromium or chromedriver is missing"
        pytest.skip("no chromium")
    options = webdriver.ChromeOptions()
    options.binary_location = str(tools[0])
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    service = webdriver.ChromeService(executable_path=str(tools[1]))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: webdriver.Chrome) -> Iterator[webdriver.Chrome]:
    yield chromium
    assert chromium.get_log("browser") == []  # type: ignore[no-untyped-call]


def opened(browser: webdriver.Chrome, tmp_path: Path, fragment: str = "") -> webdriver.Chrome:
    browser.get("about:blank")
    browser.get((tmp_path / "out" / "report.html").as_uri() + fragment)
    return browser


def lines_of(figure: WebElement) -> int:
    return len(figure.find_elements(By.CSS_SELECTOR, "path[fill=none]"))


@pytest.fixture
def small_report(make_run: MakeRun, tmp_path: Path) -> Path:
    for model in ("resnet20", "plain20"):
        for seed in (0, 1):
            make_run(model, seed, 0.1 + 0.01 * seed)
    make_run("plain56", 0, test=None)
    report(tmp_path, "--models", "resnet20,plain20,plain56", "--seeds", "0-1")
    return tmp_path


def test_curves_are_drawn_and_switched(browser: webdriver.Chrome, small_report: Path) -> None:
    opened(browser, small_report)
    plain, residual = browser.find_elements(By.CSS_SELECTOR, "figure.fig6")
    assert (lines_of(plain), lines_of(residual)) == (4, 2)
    browser.find_element(By.CSS_SELECTOR, "input[value=plain56]").click()
    assert (lines_of(plain), lines_of(residual)) == (2, 2)
    for seed in ("0", "1"):
        box = browser.find_element(By.CSS_SELECTOR, f"input[name=seed][value='{seed}']")
        box.send_keys(Keys.SPACE)  # by keyboard
    assert (lines_of(plain), lines_of(residual)) == (0, 0)


def test_values_are_read_with_pointer_and_keys(
    browser: webdriver.Chrome, small_report: Path
) -> None:
    opened(browser, small_report, "#run-0-resnet20-0")
    details = browser.find_element(By.ID, "run-0-resnet20-0")
    assert details.get_attribute("open")
    figure = details.find_element(By.CSS_SELECTOR, "figure[data-curves=loss]")
    svg, readout = (figure.find_element(By.CSS_SELECTOR, one) for one in ("svg", ".readout"))
    ActionChains(browser).move_to_element(svg).perform()
    assert "loss" in readout.text
    svg.send_keys(Keys.HOME)
    assert readout.text == "iteration 100: loss 0.01"
    svg.send_keys(Keys.ARROW_RIGHT)
    assert readout.text == "iteration 200: loss 0.005"


def test_every_cell_is_there_with_its_records(
    browser: webdriver.Chrome, small_report: Path
) -> None:
    opened(browser, small_report)
    text = browser.find_element(By.TAG_NAME, "main").text
    for words in ("10.50 ± 0.71", "missing", "waiting"):
        assert words in text, words
    browser.find_element(By.LINK_TEXT, "11.00").click()
    details = browser.find_element(By.CSS_SELECTOR, "details[open]")
    assert "audit" in details.text
    link = details.find_element(By.LINK_TEXT, "metrics.jsonl").get_attribute("href")
    assert link and Path(link.removeprefix("file://")).is_file()


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_any_screen(
    browser: webdriver.Chrome, small_report: Path, width: int, scheme: str
) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme_feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme_feature)
    opened(browser, small_report)
    ask = browser.execute_script  # type: ignore[no-untyped-call]
    assert ask("return document.documentElement.scrollWidth") <= width
    background = ask("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 29)")
    font = ask(
        "const t = document.querySelector('svg text'), s = t.closest('svg');"
        "return 12 * s.getBoundingClientRect().width / s.viewBox.baseVal.width"
    )
    assert font > 9  # pixels


def test_markup_in_every_field_stays_text(
    browser: webdriver.Chrome, make_run: MakeRun, tmp_path: Path
) -> None:
    fields = ("data", "data_source", "hardware", "device", "precision", "kernels", "os")
    path = make_run(
        **dict.fromkeys(fields, MARKUP),
        recipe_hash=MARKUP,
        git_commit=MARKUP,
        versions={MARKUP: MARKUP},
        grid=f"g{MARKUP.replace('/', '')}"[:60],
    )
    (path / "log.txt").write_text(MARKUP)
    damaged = make_run(seed=1)
    (damaged / "config.json").write_text(f'{{"model": "{MARKUP[:20]}"}}')
    report(tmp_path)
    opened(browser, tmp_path)
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 2
    text = browser.find_element(By.TAG_NAME, "body").text
    assert text.count("<script>alert('x')</script>") >= 3


def test_nothing_is_fetched(small_report: Path) -> None:
    page = (small_report / "out" / "report.html").read_text()
    assert "http://www.w3.org/2000/svg" in page
    assert page.count("http") == page.count("http://www.w3.org/2000/svg") + page.count("http-equiv")
