"""Pages of traces in a real browser: drawn, read, walked through, and deaf to what strangers write."""

import json

import pytest
from chromium import DESK, PHONE, contrast, opened, sticking_out
from drawn_job import MS, job, many, trace_of, training

from bench.traces.diff import difference
from bench.traces.events import Kind
from bench.traces.page import write_difference_page, write_trace_page
from bench.traces.page.document import script

HOSTILE = (
    "\"><script>alert(1)</script><img src=x onerror=alert(2)>'{{ 7 * 7 }}</style></svg></title>"
    "javascript:alert(3)\u202eelpmis\x1b[31m\0\u2028&lt;"
)


@pytest.fixture(scope="module")
def trace_page(tmp_path_factory):
    ranks = job(training(0, "rank0.json"), training(1, "rank1.json"))
    return write_trace_page(ranks, tmp_path_factory.mktemp("page") / "trace.html")


@pytest.fixture(scope="module")
def difference_page(tmp_path_factory):
    base, new = job(training()), job(training(slow=1.5))
    path = tmp_path_factory.mktemp("page") / "difference.html"
    return write_difference_page(base, new, difference(base, new), path)


def painted(tab, canvas, variable):
    """How many pixels of a canvas have the style's colour in one of its four shades."""
    count = """(one, variable) => {
      const style = getComputedStyle(document.documentElement);
      const parts = (name) => {
        const number = parseInt(style.getPropertyValue(name).trim().slice(1), 16);
        return [number >> 16, (number >> 8) & 255, number & 255];
      };
      const [colour, paper] = [parts(variable), parts('--paper')];
      const number = ([red, green, blue]) => (red << 16) | (green << 8) | blue;
      const shades = new Set([0, 1, 2, 3].map((shade) =>
        number(colour.map((part, i) => Math.round(part + (paper[i] - part) * shade * 0.11)))));
      const data = one.getContext('2d').getImageData(0, 0, one.width, one.height).data;
      let found = 0;
      for (let i = 0; i < data.length; i += 4) found += shades.has(number(data.slice(i, i + 3)));
      return found; }"""
    return tab.locator(canvas).evaluate(count, variable)


def soon_painted(tab, canvas, variable, more_than):
    """Canvases are drawn in frames, which a busy machine gives late: false only after seconds without."""
    for _ in range(100):
        if painted(tab, canvas, variable) > more_than:
            return True
        tab.wait_for_timeout(50)
    return False


# --- it is there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("kind", ["trace_page", "difference_page"])
def test_a_page_opens_and_draws(browser, request, kind, size):
    path = request.getfixturevalue(kind)
    tab, wrong = opened(browser, path, **size)
    tab.wait_for_timeout(100)
    assert wrong == []
    # Four all_reduce of 1 ms in 40 ms, 14 pixels high, for each rank or side.
    each = tab.locator("#timeline canvas").evaluate("one => one.width") / 40 * 14
    assert soon_painted(tab, "#timeline canvas", "--c1", 0.7 * 4 * each)
    if kind == "trace_page":
        assert soon_painted(tab, "#flame canvas", "--c5", 100)  # aten::mm
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    width = size["viewport"]["width"]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert sticking_out(tab, width) == []
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_read_in_either_colour_scheme(browser, trace_page, scheme):
    tab, _ = opened(browser, trace_page, color_scheme=scheme, **DESK)
    paper = tab.locator("section.card").first.evaluate("one => getComputedStyle(one).backgroundColor")
    assert (contrast(paper, "rgb(0,0,0)") > 10) == (scheme == "light")
    for selector in (".sentence", ".soft", ".legend li", "td", "thead th", ".selected p", "summary"):
        colours = tab.locator(selector).evaluate_all("all => all.map(one => getComputedStyle(one).color)")
        assert colours
        assert min(contrast(paper, colour) for colour in colours) >= 4.5, selector
    tab.close()


def test_without_a_script_the_tables_say_it(browser, trace_page):
    tab, wrong = opened(browser, trace_page, java_script_enabled=False, **DESK)
    assert [line for line in wrong if "script" not in line] == []
    text = tab.locator("body").inner_text()
    assert "drawn by the page's own script, which does not run here" in text
    assert "aten::mm" in text
    tab.close()


def test_numbers_are_unpacked_exactly(browser, trace_page):
    from bench.traces.page.packing import pack_signed

    numbers = [0, 1, -1, 127, 128, -(2**51), 2**51, 300, -300]
    tab, _ = opened(browser, trace_page)
    unpack = script().split("function pageData")[0].removeprefix("(() => {\n'use strict';\n")
    found = tab.evaluate(
        f"(() => {{ {unpack}\nreturn [...unpackSigned({json.dumps(pack_signed(numbers))})]; }})()"
    )
    assert found == numbers
    tab.close()


# --- the flame graph -----------------------------------------------------------------------------------


def test_keys_walk_through_the_call_tree(browser, trace_page):
    tab, wrong = opened(browser, trace_page, **DESK)
    tab.locator("#flame .viewport").focus()
    said = tab.locator("#flame .selected")
    walked = []
    for _ in range(4):
        tab.keyboard.press("ArrowDown")
        walked.append(said.locator(".slice-name").inner_text())
    assert walked == ["ProfilerStep", "forward", "aten::mm", "cudaLaunchKernel"]
    text = " ".join(said.inner_text().split())
    assert "in all 4.00 ms" in text
    assert "calls 8" in text
    tab.keyboard.press("ArrowUp")
    tab.keyboard.press("Enter")
    assert said.locator(".slice-name").inner_text() == "aten::mm"
    tab.keyboard.press("Escape")
    assert said.locator(".slice-name").count() == 0
    assert wrong == []
    tab.close()


def test_device_time_stands_by_the_call_that_launched_it(browser, trace_page):
    tab, _ = opened(browser, trace_page, **DESK)
    tab.locator("#flame select[name=place]").select_option("device")
    tab.locator("#flame input[type=search]").fill("gemm")
    assert tab.locator("#flame .found").inner_text() == "1 frame, 16.0 ms (66.7 %)"
    tab.close()


def test_time_of_devices_alone_is_drawn(browser, tmp_path):
    """A report without the host's side, and a difference of two: there is no choice of whose time it is."""
    rows = [("gemm", Kind.KERNEL, 1, 0, 2 * MS, -1)]
    one, other = (job(trace_of([(*row[:4], ms * MS, -1) for row in rows])) for ms in (2, 3))
    pages = {
        write_trace_page(one, tmp_path / "trace.html"): "in all 2.00 ms (100 %)",
        write_difference_page(
            one, other, difference(one, other), tmp_path / "new.html"
        ): "new 3.00 ms a step",
    }
    for page, said in pages.items():
        tab, wrong = opened(browser, page, **DESK)
        assert tab.locator("#flame select[name=place]").count() == 0
        tab.locator("#flame input[type=search]").fill("gemm")
        assert tab.locator("#flame .found").inner_text().endswith("(100 %)")
        tab.locator("#flame .viewport").focus()
        tab.keyboard.press("ArrowDown")
        tab.keyboard.press("ArrowDown")
        assert said in " ".join(tab.locator("#flame .selected").inner_text().split())
        assert wrong == []
        tab.close()


def test_a_difference_is_said_with_its_sign(browser, difference_page):
    tab, wrong = opened(browser, difference_page, **DESK)
    tab.locator("#flame select[name=place]").select_option("device")
    tab.locator("#flame .viewport").focus()
    for _ in range(5):
        tab.keyboard.press("ArrowDown")
    text = " ".join(tab.locator("#flame .selected").inner_text().split())
    assert text == "gemm base 2.00 ms a step new 3.00 ms a step change +1.00 ms (+50.0 %)"
    for width in ("base", "new", "larger"):
        tab.locator("#flame select[name=width]").select_option(width)
    assert wrong == []
    tab.close()


# --- strangers -----------------------------------------------------------------------------------------


def test_hostile_names_do_nothing(browser, tmp_path):
    def hostile(text):
        return text + HOSTILE

    base, new = job(training(rename=hostile)), job(training(rename=hostile, slow=2.0))
    for trace in (*base.traces, *new.traces):
        trace.notes, trace.source = [HOSTILE], HOSTILE
        trace.dropped[HOSTILE] = trace.unclassified[HOSTILE] = 1
    base.failures.append((HOSTILE, HOSTILE))
    base.source = HOSTILE
    pages = [
        write_trace_page(base, tmp_path / "hostile.html"),
        write_difference_page(base, new, difference(base, new), tmp_path / "difference.html"),
    ]
    for page in pages:
        tab, wrong = opened(browser, page, **PHONE)
        tab.locator("#timeline input[type=search]").fill("gemm")
        tab.locator("#timeline input[type=search]").press("Enter")
        tab.locator("#timeline .in-view summary").click()
        tab.locator("#flame .viewport").focus()
        tab.keyboard.press("ArrowDown")
        tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert tab.locator("script").count() == 2
        assert tab.locator("img, iframe, object, form, a").count() == 0
        name = tab.locator("#timeline .slice-name").inner_text()
        assert name.startswith('gemm"><script>alert(1)</script><img src=x onerror=alert(2)>')
        assert not set("\u202e\x1b\0\u2028") & set(tab.content())
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        assert wrong == []
        tab.close()


def test_endless_names_stay_inside(browser, tmp_path):
    page = write_trace_page(job(training(rename=lambda text: text + "x" * 10**5)), tmp_path / "long.html")
    tab, wrong = opened(browser, page, **PHONE)
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert wrong == []
    tab.close()


# --- large ---------------------------------------------------------------------------------------------

FRAMES = """async () => {
  const viewport = document.querySelector('#timeline .viewport');
  const box = viewport.getBoundingClientRect();
  const times = [];
  let last = performance.now();
  for (let frame = 0; frame < 80; frame++) {
    viewport.querySelector('canvas').dispatchEvent(new WheelEvent('wheel', { bubbles: true, cancelable: true,
      ctrlKey: true, deltaY: frame < 40 ? -120 : 120, clientX: box.x + box.width / 3, clientY: box.y + 80 }));
    await new Promise(done => requestAnimationFrame(done));
    await new Promise(done => setTimeout(done, 0));
    times.push(performance.now() - last);
    last = performance.now();
  }
  return times;
}"""


RECTANGLES = """async () => {
  const original = CanvasRenderingContext2D.prototype.fillRect;
  let count = 0;
  CanvasRenderingContext2D.prototype.fillRect = function (...box) { count++; original.apply(this, box); };
  document.querySelector('#timeline [data-do=whole]').click();
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  CanvasRenderingContext2D.prototype.fillRect = original;
  const { width, height } = document.querySelector('#timeline canvas');
  return [count, width * Math.ceil(height / 16)];
}"""


@pytest.mark.alone
def test_200_000_slices_are_drawn_at_once_and_zoomed_without_a_stall(browser, tmp_path):
    path = write_trace_page(job(many(200_000)), tmp_path / "large.html")
    assert path.stat().st_size < 6_000_000
    paints, medians, worst = [], [], []
    for _ in range(3):
        tab, wrong = opened(browser, path, **DESK)
        paints.append(int(tab.locator("#timeline").get_attribute("data-first-paint")))
        tab.locator("#timeline canvas").scroll_into_view_if_needed()
        # A frame has no more rectangles than its rows have pixels, however many slices are in view.
        rectangles, pixels = tab.evaluate(RECTANGLES)
        assert 1000 < rectangles < pixels
        times = sorted(tab.evaluate(FRAMES))
        medians.append(times[len(times) // 2])
        worst.append(times[-4])  # the 95th percentile of 80
        assert wrong == []
        tab.close()
        # The machine may be busy and paints in software: the best of three tries counts.
        if min(paints) < 2000 and min(medians) < 50 and min(worst) < 150:
            break
    print(f"first paint {min(paints)} ms, frame {min(medians):.0f} ms, 95 % below {min(worst):.0f} ms")
    assert min(paints) < 2000
    assert min(medians) < 50
    assert min(worst) < 150
