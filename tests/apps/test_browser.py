"""Reports in a real browser: `pytest -m browser`."""

import base64
import io
import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import random_adapters

import coremerge_jax as cm
from coremerge_jax import demo

pytestmark = pytest.mark.browser

WIDTHS = (1280, 400)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PUBLISHED = sorted(RESULTS.glob("*/text8-report.html"))
# Each figure's place and marks in color (not axes, not text), and what is too small or too wide.
LOOK = """
const colored = (x) => x.tagName === "image" || ["stroke", "fill"].some((name) => {
  const color = (getComputedStyle(x)[name].match(/[\\d.]+/g) || []).slice(0, 3).map(Number);
  return Math.max(...color) - Math.min(...color) > 40;
});
const large = (x) => {
  const r = x.getBoundingClientRect();
  return Math.max(r.width, r.height) >= 6 && Math.min(r.width, r.height) > 0;
};
const figures = [...document.querySelectorAll("figure")].map((figure) => {
  const image = figure.querySelector("svg"), r = image.getBoundingClientRect();
  const marks = [...image.querySelectorAll("path, image")].filter((x) => colored(x) && large(x));
  return {
    title: figure.querySelector("h3").textContent,
    label: figure.querySelector("[role=img]").getAttribute("aria-label"),
    caption: figure.querySelector("figcaption").textContent.trim(),
    box: [r.x + scrollX, r.y + scrollY, r.width, r.height],
    marks: marks.length,
  };
});
const written = (x) => [...x.childNodes].some((y) => y.nodeType === 3 && y.textContent.trim());
const texts = [...document.querySelectorAll("body *")]
  .filter((x) => written(x) && x.getClientRects().length);
const size = (x) => {
  const svg = x.closest("svg");
  const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
  return parseFloat(getComputedStyle(x).fontSize) * scale;
};
return {
  figures,
  smallest: Math.min(...texts.map(size)),
  outside: texts.filter((x) => x.getBoundingClientRect().right > innerWidth + 1)
    .map((x) => x.textContent),
  width: document.documentElement.scrollWidth,
  requests: performance.getEntriesByType("resource").map((x) => x.name)
    .filter((x) => !x.startsWith("data:")),
};
"""


def found(name):
    path = shutil.which(name)
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"there is no {name}")
    return path


@pytest.fixture(scope="module")
def browser():
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = found("chromium")
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(found("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report of the demo's adapters and their merge, and one of many adapters and modules."""
    folder = tmp_path_factory.mktemp("pages")
    adapters = [cm.load_peft(path) for path in demo.adapters()]
    merged = cm.merge(adapters, cm.chain(cm.tsv(), cm.isotropize()))
    cm.diagnose(adapters, merged).to_html(folder / "demo.html")
    shapes = {f"layers.{i}.{kind}": (10, 8) for i in range(12) for kind in "abcdefghij"}
    many = [
        adapter.replace(metadata=cm.Metadata(name=f"the adapter of task number {t}"))
        for t, adapter in enumerate(random_adapters(shapes, [2] * 40))
    ]
    cm.diagnose(many, cm.merge(many, cm.mean())).to_html(folder / "many.html")
    return folder


def screenshot(browser, box):
    """The pixels of a part of the page, ``(height, width, 3)``."""
    from matplotlib.image import imread

    clip = {**dict(zip(("x", "y", "width", "height"), box, strict=True)), "scale": 1}
    options = {"clip": clip, "captureBeyondViewport": True}
    image = browser.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
    return imread(io.BytesIO(base64.b64decode(image)))[:, :, :3]


def looks():
    """Each page, at each width, in each scheme; not at night, each page once."""
    every = itertools.product(["demo.html", "many.html", *PUBLISHED], WIDTHS, ["light", "dark"])
    for i, (name, width, scheme) in enumerate(every):
        marks = [] if i % 4 == 3 * (i // 4 % 2) else [pytest.mark.nightly]
        yield pytest.param(
            name, width, scheme, marks=marks, id=f"{Path(name).name}-{width}-{scheme}"
        )


@pytest.mark.parametrize(("name", "width", "scheme"), list(looks()))
def test_a_page_can_be_read(browser, pages, name, width, scheme):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    path = pages / name
    browser.get(path.as_uri())
    look = browser.execute_script(LOOK)
    assert browser.get_log("browser") == []
    assert look["requests"] == []
    assert look["width"] <= width
    assert look["outside"] == []
    assert look["smallest"] >= 10
    assert len(look["figures"]) == (page := path.read_text()).count("<figure")
    assert len(page) < 3 * 2**20
    for figure in look["figures"]:
        assert figure["title"] in figure["label"]
        assert figure["caption"]
        *_, wide, high = figure["box"]
        assert wide >= 340
        assert high >= 100
        assert figure["marks"] > 0, figure["title"]
        pixels = screenshot(browser, figure["box"]).reshape(-1, 3)
        colors, counts = np.unique((pixels * 15).round(), axis=0, return_counts=True)
        # Lines, text and at least one color that is not gray.
        assert len(colors) > 3, figure["title"]
        assert (np.ptp(colors, axis=1) >= 3).any(), figure["title"]
        assert counts.max() < 0.98 * len(pixels), figure["title"]
