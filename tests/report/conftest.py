"""A headless Chromium, and pages that complain about nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.privileges import skip_if
from tests.sharedmemory.conftest import shm_dir

__all__ = ["shm_dir"]

#: Screenshots are kept here where it is set, as by CI that keeps artefacts.
ARTEFACTS = "LBGYM_TEST_ARTEFACTS"
#: Without these it would call home.
_ALONE = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")

#: Messages of the console that say that something is wrong.
_BAD = ("error", "warning")

Open = Callable[..., Any]


def _chromium() -> str | None:
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium under Playwright."""
    path = _chromium()
    if path is None:
        skip_if("no Chromium: make chromium", "the tests of pages")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as play:
        # Chromium's sandbox refuses root.
        chromium = play.chromium.launch(executable_path=path, args=[*_ALONE, "--disable-gpu", "--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens a page at a width; in the end nobody complained in the console, or asked for anything from elsewhere."""
    folder = Path(os.environ.get(ARTEFACTS, tmp_path))
    contexts = []

    @contextmanager
    def opening(url: str, width: int = 1300, height: int = 900, *, dark: bool = False) -> Iterator[Any]:
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        page = context.new_page()
        complaints: list[str] = []
        origins: set[str] = set()
        page.on("console", lambda message: complaints.append(message.text) if message.type in _BAD else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: origins.add(urlsplit(asked.url).netloc))
        page.goto(url)
        yield page
        folder.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=folder / f"{request.node.name}-{width}.png", full_page=True)
        assert not complaints
        assert origins <= {urlsplit(url).netloc}

    yield opening
    for context in contexts:
        context.close()
