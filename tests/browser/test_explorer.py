"""The explorer page in a real browser: open, hover, click, keys, switches, widths, themes and print."""

import shutil

import pytest
from made_results import SITES, TILE, make_results, make_universality

from report.gather import gather
from report.page import write_page
from utils import HOME

INSTALL = "playwright is not installed: pip install -r requirements-dev.txt -r tests/browser/requirements.txt"
pytest.importorskip("playwright", reason=INSTALL)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium is installed here: apt-get install chromium", allow_module_level=True)

from playwright.sync_api import sync_playwright  # noqa: E402 (only once it is known to be there)

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync"]
HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">'
MAP = "#plane-map .map"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    return write_page(gather([make_results(root / "results")]), root / "page.html")


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    return write_page(gather([HOME / "results"]), tmp_path_factory.mktemp("committed") / "page.html")


@pytest.fixture
def show(browser):
    """show(file, …) -> the page, once it is drawn; whatever a console or the network says fails the test at its end."""
    said, contexts = [], []

    def open_(file, width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("request", lambda asked: said.append(asked.url) if asked.url.startswith("http") else None)
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert said == []


def wait(page, expression):
    """Until it holds; playwright's own waiting evaluates text inside the page, which the page's policy forbids."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {expression}")


def cell(page, row, column, rows, columns, host=MAP):
    """The middle of a cell of a heat map in pixels of the window."""
    page.locator(host).scroll_into_view_if_needed()
    box = page.locator(f"{host} .nsewdrag").first.bounding_box()
    return box["x"] + (column + 0.5) * box["width"] / columns, box["y"] + (row + 0.5) * box["height"] / rows


def test_hovering_a_cell_says_value_interval_p_null_ceiling_floor_and_u(show, made):
    page = show(made)
    page.mouse.move(*cell(page, 1, 0, 2, 2))
    hover = page.locator(f"{MAP} .hoverlayer .hovertext")
    hover.wait_for()
    text = hover.text_content()
    for words in ("encoder.b", "swin.x", "value: 0.3 (0.25 … 0.35)", "p: 0.05", "q: 0.04", "null: 0, 95 % below 0.02"):
        assert words in text
    for words in ("ceiling: 0.9 (0.85 … 0.95)", "floor: 0.1 (0.05 … 0.15)", "u: 0.25 (0.2 … 0.3)", "verdict: partial"):
        assert words in text


def test_a_click_shows_both_sites_and_what_they_see_of_the_same_images(show, made):
    page = show(made)
    page.mouse.click(*cell(page, 1, 0, 2, 2))
    wait(page, "document.querySelectorAll('#details canvas').length === 6")
    text = page.locator("#details").inner_text().replace("\u200b", "")
    for words in ("encoder.b", "swin.x", "batch channel height width", "2 × 4 × 4", "1 × 4 × 4", "0.25 (0.2 … 0.3)"):
        assert words in text
    # rows of the made atlas: the images 0, encoder.a 1, encoder.b 2, decoder.c 3, swin.x 4; red is 20 × row
    pixels = "[...document.querySelectorAll('#details canvas')]"
    pixels += ".map(each => [...each.getContext('2d').getImageData(1, 1, 1, 1).data])"
    wait(page, f"{pixels}.every(pixel => pixel[3] === 255)")
    colours = page.evaluate(pixels)
    expected = [[20 * row, 60 * column, 255, 255] for column in range(2) for row in (0, 2, 1 + len(SITES["unetpp"]))]
    assert colours == expected and page.locator("#details canvas").first.get_attribute("width") == str(TILE)


def test_the_keyboard_alone_moves_opens_and_comes_back(show, made):
    page = show(made)
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('map')"):
            break
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):  # the last one meets the edge
        page.keyboard.press(key)
    assert page.locator("#plane-map .readout").inner_text().startswith("encoder.b × swin.y: value 0.35")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "details-title"
    assert "swin.y" in page.locator("#details").inner_text().replace("\u200b", "")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.classList.contains('map')")


def test_switches_change_what_the_plane_and_the_depth_show(show, made):
    page = show(made)
    first = "document.querySelector('#plane-map .map').data[0].z[0][0]"
    assert page.evaluate(first) == 0.2
    page.get_by_label("calibrated (u)").first.check(force=True)
    assert page.evaluate(first) == pytest.approx(0.125)
    assert "u of linear_cka" in page.locator("#plane-caption").inner_text()
    page.get_by_label("raw", exact=True).first.check(force=True)
    page.get_by_label("Spatial policy", exact=True).select_option("grid:4")
    assert page.evaluate(first) == pytest.approx(0.1)
    page.get_by_label("Spatial policy", exact=True).select_option("gap")
    page.get_by_label("Measure", exact=True).select_option("rsa")
    assert page.evaluate(first) == pytest.approx(0.3)
    page.get_by_label("decoders").first.check(force=True)
    assert page.evaluate("document.querySelector('#plane-map .map').data[0].z[0].length") == 2
    assert "decoders" in page.locator("#depth-plot").text_content()
    page.get_by_label("all sites").check(force=True)
    assert page.evaluate("document.querySelectorAll('#depth-plot .xtitle, #depth-plot .x2title').length") == 2
    names = page.evaluate("document.querySelector('#depth-plot').data.map(each => each.name)")
    assert names.count("ceiling") == names.count("floor") == names.count("rsa") == 2


def test_every_study_is_drawn(show, made):
    page = show(made)
    for name, traces in (("explanations", "heatmap"), ("steps", "heatmap"), ("matrix", "heatmap")):
        assert page.evaluate(f"document.querySelector('#{name}-map .map').data[0].type") == traces
    tree = "document.querySelector('#explanations-map .map').data.filter(each => each.yaxis === 'y2').length"
    assert page.evaluate(tree) == 3
    page.get_by_label("Value", exact=True).last.wait_for(state="attached")
    page.locator("#steps-switches select").last.select_option("b_to_a")
    assert page.evaluate("document.querySelector('#steps-map .map').data[0].zmax") == pytest.approx(0.1)
    assert "n = 40 images" in page.locator("#steps-caption").inner_text()
    assert page.evaluate("document.querySelector('#steps-map .map').data[0].z[0]") == pytest.approx([0, 0.1])
    row = page.locator("#legacy-table tbody tr").first.inner_text()
    assert "0.0682 / 0.0295" in row and "changes sign" in row and "0.4 (0.3 … 0.5)" in row
    assert "commit: 0123456789ab" in page.locator("#runs").inner_text()


def test_studies_that_have_not_run_are_named_with_their_command(show, tmp_path):
    make_universality(tmp_path / "results" / "one")
    page = show(write_page(gather([tmp_path / "results"]), tmp_path / "page.html"))
    for name, command in (("legacy", "legacy"), ("explanations", "explanations"), ("matrix", "architectures")):
        text = page.locator(f"#{name}").inner_text()
        assert "has not run" in text and f"python experiments.py {command}" in text


def test_names_from_tables_are_text_and_never_run(show, tmp_path):
    page = show(write_page(gather([make_results(tmp_path / "results", HOSTILE)]), tmp_path / "page.html"))
    page.mouse.move(*cell(page, 0, 0, 2, 2))
    page.locator(f"{MAP} .hoverlayer .hovertext").wait_for()
    assert "<script>" in page.locator(f"{MAP} .hoverlayer").text_content()
    page.mouse.click(*cell(page, 0, 0, 2, 2))
    for name in ("explanations-map", "matrix-map", "steps-map"):
        page.locator(f"#{name} .map").focus()
        page.keyboard.press("ArrowRight")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0 and "<script>" in page.locator("#legacy-table").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_sees_the_committed_results_without_scrolling_sideways(show, committed, tmp_path, scheme):
    page = show(committed, width=360, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator("input[name=part][value=all]").check(force=True)
    page.locator(MAP).focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator("#plane-map .names summary").click()
    assert page.locator("#plane-map .names li").first.inner_text() == "encoder.relu"
    shot = tmp_path / "phone.png"
    page.screenshot(path=shot, full_page=True)
    assert shot.stat().st_size > 50_000
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    plot = page.evaluate("document.querySelector('#plane-map .map').layout.paper_bgcolor")
    assert (plot == "#ffffff") == (scheme == "light")


def test_a_change_of_theme_is_followed(show, made):
    page = show(made, color_scheme="light")
    page.emulate_media(color_scheme="dark")
    wait(page, "document.querySelector('#plane-map .map').layout.paper_bgcolor !== '#ffffff'")


def test_it_prints_light_and_within_the_paper_and_the_screen_is_as_before(show, made, tmp_path):
    page = show(made, color_scheme="dark")
    state = "[document.querySelector('#plane-map .map').layout.paper_bgcolor, "
    state += "document.querySelector('#plane-map .map').layout.width]"
    before = page.evaluate(state)
    listen = "window.printed = []; window.addEventListener('beforeprint', () => window.printed.push({}))"
    page.evaluate(listen.format(state))
    page.pdf(path=tmp_path / "page.pdf", format="A4", print_background=True)
    assert page.evaluate("window.printed") == [["#ffffff", 660]] and page.evaluate(state) == before
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
