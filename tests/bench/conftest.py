"""A real browser for the tests of pages, and a short name for the command."""

import chromium
import pytest


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window; one a module, because playwright keeps an event loop running meanwhile."""
    if chromium.PATH is None:
        pytest.skip("no Chromium on this machine (chromium, chromium-browser or google-chrome)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as play:
        running = play.chromium.launch(executable_path=chromium.PATH, args=chromium.ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def run(in_process):
    return in_process
