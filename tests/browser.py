"""A headless Chromium for tests (Debian: chromium, chromium-driver), at the width of a phone or of a desk."""
import contextlib
import os
import shutil

import pytest

missing = not (shutil.which("chromium") and shutil.which("chromedriver"))
needs_chromium = pytest.mark.skipif(missing and not os.environ.get("CI"), reason="no chromium and chromedriver; CI has them")
QUIET = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
         "disable-component-update", "disable-sync", "hide-scrollbars", "disable-dev-shm-usage",
         "allow-file-access-from-files")


@contextlib.contextmanager
def chromium(profile, *, width=1200, height=900):
    """A Selenium driver with a fresh profile, its window as wide as asked."""
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*QUIET, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})
        driver.set_page_load_timeout(120)
        yield driver
    finally:
        driver.quit()


def errors_of(driver):
    """What the console has said since the last call, from warnings on."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
