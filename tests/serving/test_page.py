"""The page in headless Chromium; skipped where there is none."""

import os
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from serving_start import end, start

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
SCHEMA = '{"type": "object", "properties": {"name": {"const": "isthmus"}}, "required": ["name"]}'
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no Chromium here")


@pytest.fixture(scope="module")
def served():
    """A server whose drafter always drafts, so that there is something to see."""
    running = start(drafter="token-recycling", num_draft_tokens=12)
    yield running
    end(running)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1000,1400",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield made
    made.quit()


def text(browser, name):
    return browser.find_element(By.ID, name).get_attribute("textContent")


def decode(browser, served, prompt, *, tokens=24, **fields):
    browser.get(served.url)
    for name, value in {"prompt": prompt, "tokens": str(tokens), **fields}.items():
        element = browser.find_element(By.ID, name)
        browser.execute_script("arguments[0].value = arguments[1]", element, value)
    browser.find_element(By.ID, "prompt").send_keys(Keys.CONTROL, Keys.ENTER)  # no mouse needed
    WebDriverWait(browser, 30).until(lambda b: text(b, "n-finish") not in ("–", "…"))


def shot(browser, name):
    folder = os.environ.get("ISTHMUS_SHOTS")
    if folder:
        browser.save_screenshot(f"{folder}/{name}.png")


def test_it_decodes_and_shows_who_proposed_what(browser, served):
    prompt = "def add(a, b):\n    return a + b\n\n\ndef add(a, b):\n    return"
    decode(browser, served, prompt, tokens=96)
    want = served.post("/v1/completions", prompt=prompt, max_tokens=96, temperature=0).json()
    assert text(browser, "answer") == want["choices"][0]["text"]
    assert text(browser, "model") == "pycode-t" and text(browser, "n-tokens") == "96"
    forwards = int(text(browser, "n-forwards"))
    assert len(browser.find_elements(By.CSS_SELECTOR, "#rounds > li")) == forwards
    assert len(browser.find_elements(By.CSS_SELECTOR, "#graph rect")) == 96
    assert len(browser.find_elements(By.CSS_SELECTOR, "#answer .target")) >= forwards - 1
    assert not browser.find_element(By.ID, "key-field").is_displayed()
    assert browser.find_elements(By.CSS_SELECTOR, "#answer .by-0") and forwards < 96
    browser.find_element(By.ID, "rejected").click()
    assert browser.find_elements(By.CSS_SELECTOR, "#rounds details[open] .gone")
    shot(browser, "page")
    browser.execute_script("document.getElementById('rounds').scrollIntoView()")
    shot(browser, "rounds")


def test_forced_tokens_are_marked(browser, served):
    decode(browser, served, "x = ", schema=SCHEMA)
    assert text(browser, "answer") == '{"name":"isthmus"}'
    assert browser.find_elements(By.CSS_SELECTOR, "#answer .forced")
    shot(browser, "forced")


def test_what_a_model_writes_is_no_markup(browser, served):
    decode(browser, served, "<img src=x onerror=alert(1)><script>alert(2)</script>" * 3, tokens=48)
    assert not browser.find_elements(By.CSS_SELECTOR, "#answer img, #answer script, #rounds img")
    inline = "const s = document.createElement('script'); s.textContent = 'window.bad = 1';"
    browser.execute_script(inline + "document.body.append(s)")
    assert browser.execute_script("return window.bad") is None


def test_mistakes_are_told_in_words(browser, served):
    browser.get(served.url)
    element = browser.find_element(By.ID, "schema")
    browser.execute_script("arguments[0].value = '{nonsense'", element)
    browser.find_element(By.ID, "prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    WebDriverWait(browser, 10).until(lambda b: b.find_element(By.ID, "error").is_displayed())
    assert text(browser, "error") == "the JSON Schema is no valid JSON"


@pytest.mark.parametrize("width", [360, 1000])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_both_colour_schemes(browser, served, width, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    decode(browser, served, "def fibonacci(n):", tokens=64)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    shot(browser, f"{scheme}-{width}")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
