"""Pages of traces in a real browser: drawn, moved, searched, read aloud, and deaf to what strangers write."""

import json

import pytest
from chromium import DESK, PHONE, contrast, opened, sticking_out
from drawn_job import MS, job, many, training

from bench.traces.diff import difference
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


def window(tab):
    """Start and end of what the timeline shows, in nanoseconds."""
    tab.wait_for_function("document.getElementById('timeline').dataset.view !== undefined")
    tab.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return [int(part) for part in tab.locator("#timeline").get_attribute("data-view").split()]


def colours_of(tab, canvas):
    """How many colours a canvas has."""
    return tab.locator(canvas).evaluate(
        "one => { const data = one.getContext('2d').getImageData(0, 0, one.width, one.height).data;"
        " return new Set(new Uint32Array(data.buffer)).size; }"
    )


# --- it is there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("kind", ["trace_page", "difference_page"])
def test_a_page_opens_and_draws(browser, request, kind, size):
    path = request.getfixturevalue(kind)
    tab, wrong = opened(browser, path, **size)
    tab.wait_for_timeout(100)
    assert wrong == []
    assert colours_of(tab, "#timeline canvas") > 8
    assert colours_of(tab, "#flame canvas") > 4
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


# --- the timeline --------------------------------------------------------------------------------------


def test_wheel_keys_and_buttons_move_the_window(browser, trace_page):
    tab, wrong = opened(browser, trace_page, **DESK)
    whole = window(tab)
    viewport = tab.locator("#timeline .viewport")
    viewport.scroll_into_view_if_needed()
    box = viewport.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + 100)
    tab.keyboard.down("Control")
    tab.mouse.wheel(0, -300)
    tab.keyboard.up("Control")
    near = window(tab)
    assert whole[0] < near[0] < near[1] < whole[1]
    # Zooming keeps the time under the pointer.
    assert sum(near) == pytest.approx(sum(whole), rel=0.01)
    viewport.focus()
    tab.keyboard.press("d")
    later = window(tab)
    assert later[0] > near[0]
    assert later[1] - later[0] == pytest.approx(near[1] - near[0], rel=1e-6)
    tab.keyboard.press("a")
    assert window(tab) == pytest.approx(near, abs=2)
    tab.keyboard.press("w")
    tab.keyboard.press("w")
    nearer = window(tab)
    assert nearer[1] - nearer[0] == pytest.approx((near[1] - near[0]) * 0.49, rel=0.01)
    tab.keyboard.press("s")
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] / 2 + 200, box["y"] + 100, steps=4)
    tab.mouse.up()
    assert window(tab)[0] < nearer[0]
    tab.locator("#timeline button[data-do=whole]").click()
    assert window(tab) == whole
    for _ in range(60):
        tab.keyboard.press("s")
    assert window(tab) == whole  # there is nothing beyond the whole
    assert wrong == []
    tab.close()


def test_a_bare_wheel_scrolls_the_page(browser, trace_page):
    tab, _ = opened(browser, trace_page, viewport={"width": 1200, "height": 500})
    tab.locator("#timeline canvas").scroll_into_view_if_needed()
    before, place = window(tab), tab.evaluate("scrollY")
    viewport = tab.locator("#timeline .viewport")
    viewport.hover()
    for _ in range(12):
        tab.mouse.wheel(0, 300)
    tab.wait_for_function(f"scrollY > {place}")
    assert window(tab) == before
    tab.close()


def test_search_finds_counts_and_goes_to_slices(browser, trace_page):
    tab, wrong = opened(browser, trace_page, **DESK)
    search = tab.locator("#timeline input[type=search]")
    search.fill("GEM")
    found = tab.locator("#timeline .found")
    assert found.inner_text() == "8 slices of 1 name, 16.0 ms in sum"
    search.press("Enter")
    details = tab.locator("#timeline .selected")
    assert details.locator(".slice-name").inner_text() == "gemm"
    text = " ".join(details.inner_text().split())
    for words in (
        "duration 2.00 ms",
        "kind kernel",
        "rank 0, device 0 · stream 7",
        "launched by cudaLaunchKernel",
    ):
        assert words in text
    assert "8 drawn, 16.0 ms in sum" in text
    search.press("Enter")
    search.press("Shift+Enter")
    details.locator("button").click()
    assert details.locator(".slice-name").inner_text() == "cudaLaunchKernel"
    assert "step ProfilerStep#0" in " ".join(details.inner_text().split())
    search.fill("nowhere")
    assert found.inner_text() == "nothing has this in its name"
    assert wrong == []
    tab.close()


def test_a_click_says_what_a_slice_is_and_keys_go_to_its_neighbour(browser, trace_page):
    tab, _ = opened(browser, trace_page, **DESK)
    start, end = window(tab)
    canvas = tab.locator("#timeline canvas")
    canvas.scroll_into_view_if_needed()
    width = canvas.bounding_box()["width"]
    # The first gemm runs from 2 to 4 ms; its row is the first below axis, rank, steps and its lane's name.
    x = (3 * MS - start) / (end - start) * width
    canvas.click(position={"x": x, "y": 24 + 24 + 19 + 18 + 8})
    name = tab.locator("#timeline .slice-name")
    assert name.inner_text() == "gemm"
    tab.locator("#timeline .viewport").focus()
    tab.keyboard.press(".")
    assert name.inner_text() == "all_reduce"
    tab.keyboard.press("f")
    near = window(tab)
    assert near[0] < 7 * MS < 8 * MS < near[1] < 10 * MS
    tab.keyboard.press("Escape")
    assert name.count() == 0
    tab.close()


def test_the_slices_in_view_are_a_table(browser, trace_page):
    tab, _ = opened(browser, trace_page, **DESK)
    tab.locator("#timeline .in-view summary").click()
    rows = tab.locator("#timeline .in-view tbody tr")
    rows.first.wait_for()
    assert rows.count() == 48
    assert rows.first.inner_text().split()[:3] == ["ProfilerStep#0", "9.00", "ms"]
    rows.nth(20).locator("button").click()
    assert tab.locator("#timeline .slice-name").count() == 1
    tab.close()


def test_a_rank_is_folded_and_unfolded(browser, trace_page):
    tab, _ = opened(browser, trace_page, **DESK)
    spacer = "document.querySelector('#timeline .viewport').scrollHeight"
    before = tab.evaluate(spacer)
    tab.locator("#timeline canvas").click(position={"x": 30, "y": 24 + 10})
    assert tab.evaluate(spacer) < before
    tab.locator("#timeline canvas").click(position={"x": 30, "y": 24 + 10})
    assert tab.evaluate(spacer) == before
    tab.close()


def test_two_fingers_zoom(browser, trace_page):
    tab, wrong = opened(browser, trace_page, has_touch=True, **PHONE)
    before = window(tab)
    tab.locator("#timeline canvas").scroll_into_view_if_needed()
    fingers = """([spread]) => { const canvas = document.querySelector('#timeline canvas');
      const box = canvas.getBoundingClientRect();
      const send = (type, id, x) => canvas.dispatchEvent(new PointerEvent(type, {
        pointerId: id, bubbles: true, pointerType: 'touch', clientX: box.x + x, clientY: box.y + 60 }));
      canvas.setPointerCapture = () => {};
      send('pointerdown', 1, 140); send('pointerdown', 2, 180);
      for (let i = 0; i <= 10; i++) {
        send('pointermove', 1, 140 - spread * i / 10);
        send('pointermove', 2, 180 + spread * i / 10);
      }
      send('pointerup', 1, 0); send('pointerup', 2, 0); }"""
    tab.evaluate(fingers, [60])
    near = window(tab)
    assert (near[1] - near[0]) == pytest.approx((before[1] - before[0]) * 40 / 160, rel=0.1)
    assert wrong == []
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


@pytest.mark.alone
def test_200_000_slices_are_drawn_at_once_and_zoomed_without_a_stall(browser, tmp_path):
    path = write_trace_page(job(many(200_000)), tmp_path / "large.html")
    assert path.stat().st_size < 6_000_000
    paints, medians, worst = [], [], []
    for _ in range(3):
        tab, wrong = opened(browser, path, **DESK)
        paints.append(int(tab.locator("#timeline").get_attribute("data-first-paint")))
        tab.locator("#timeline canvas").scroll_into_view_if_needed()
        times = sorted(tab.evaluate(FRAMES))
        medians.append(times[len(times) // 2])
        worst.append(times[-4])  # the 95th percentile of 80
        assert wrong == []
        tab.close()
    print(f"first paint {min(paints)} ms, frame {min(medians):.0f} ms, 95 % below {min(worst):.0f} ms")
    # The machine may be busy and paints in software: the best of three tries counts.
    assert min(paints) < 2000
    assert min(medians) < 50
    assert min(worst) < 150
