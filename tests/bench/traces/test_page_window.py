"""The timeline in a real browser, under mouse, fingers and keys: what moves it, what it says of a slice."""

import pytest
from chromium import DESK, PHONE, opened
from drawn_job import MS, job, training

from bench.traces.page import write_trace_page


@pytest.fixture(scope="module")
def trace_page(tmp_path_factory):
    ranks = job(training(0, "rank0.json"), training(1, "rank1.json"))
    return write_trace_page(ranks, tmp_path_factory.mktemp("page") / "trace.html")


def window(tab):
    """Start and end of what the timeline shows, in nanoseconds."""
    tab.wait_for_function("document.getElementById('timeline').dataset.view !== undefined")
    tab.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return [int(part) for part in tab.locator("#timeline").get_attribute("data-view").split()]


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
