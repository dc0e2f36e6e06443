"""Pages in a real browser: a tab, and everything that went wrong while it was open."""

import shutil

PATH = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESK = {"viewport": {"width": 1200, "height": 900}}
PHONE = {"viewport": {"width": 360, "height": 740}}


def opened(browser, path, **options):
    """(tab, complaints): a list that grows with every console message, error, dialog and request."""
    wrong: list[str] = []
    tab = browser.new_page(**options)
    tab.on("console", lambda message: wrong.append(f"console: {message.text}"))
    tab.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    tab.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    tab.on("request", lambda request: request.url == path.as_uri() or wrong.append(f"request: {request.url}"))
    tab.goto(path.as_uri(), wait_until="load", timeout=30_000)
    return tab, wrong


def sticking_out(tab, width):
    """What lies beyond the right edge of the window, outside of what can be scrolled."""
    return tab.evaluate(
        "[...document.querySelectorAll('body *')].filter(one => !one.closest('svg, .scroll')"
        f" && one.getBoundingClientRect().right > {width} + 1).map(one => one.outerHTML.slice(0, 80))"
    )


def contrast(first, second):
    """The contrast ratio of two CSS colours (WCAG 2.2, relative luminance)."""

    def luminance(colour):
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
