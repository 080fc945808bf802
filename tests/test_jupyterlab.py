"""Notebook 5 in JupyterLab, as `make lab` opens it, run through the menu by a browser."""
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from browser import chromium, needs_chromium
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from carma_lib.manifest import make_plan

ROOT = Path(__file__).resolve().parent.parent
NAME = "05_how_carma_works"


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab over a folder with the notebook, its parameters those of profile ci."""
    pytest.importorskip("jupyterlab")
    plan = make_plan("ci", run_dir=tmp_path / "run", settings={})
    notebook = parameterize_notebook(load_notebook_node(str(ROOT / "notebooks" / f"{NAME}.ipynb")), plan.parameters[NAME])
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, tmp_path / f"{NAME}.ipynb")
    own = {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment = {**os.environ, **own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.port=0", "--ServerApp.ip=127.0.0.1",
             "--IdentityProvider.token=test", f"--ServerApp.root_dir={tmp_path}", "--LabApp.news_url=None"],
            cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/lab", (tmp_path / "log").read_text())):
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{found[1]}/lab/tree/{NAME}.ipynb?token=test"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:  # stopped while a kernel began
            server.kill()
            server.wait(20)


@needs_chromium
def test_run_all_cells(lab, tmp_path):
    from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support import expected_conditions as expected
    from selenium.webdriver.support.ui import WebDriverWait

    def click(place, selector):
        WebDriverWait(driver, 120).until(expected.element_to_be_clickable((place, selector))).click()

    with chromium(tmp_path / "profile") as driver:
        driver.get(lab)
        WebDriverWait(driver, 120, ignored_exceptions=[NoSuchElementException, StaleElementReferenceException]).until(
            lambda page: "Python 3" in page.find_element(By.CSS_SELECTOR, ".jp-KernelName").text
            and not page.find_elements(By.CSS_SELECTOR, "dialog.jp-Dialog"), "no kernel, or JupyterLab asks something")
        click(By.XPATH, "//li[contains(@class, 'lm-MenuBar-item')]//div[text()='Run']")
        click(By.CSS_SELECTOR, "li[data-command='runmenu:run-all']")
        deadline = time.monotonic() + 300
        while True:  # saved through the menu until every cell has run
            click(By.XPATH, "//li[contains(@class, 'lm-MenuBar-item')]//div[text()='File']")
            click(By.CSS_SELECTOR, "li[data-command='docmanager:save']")
            time.sleep(2)
            cells = [cell for cell in json.loads((tmp_path / f"{NAME}.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
            errors = ["\n".join(output["traceback"]) for cell in cells for output in cell["outputs"]
                      if output["output_type"] == "error"]
            assert not errors, errors[0]
            if all(cell["execution_count"] for cell in cells if cell["source"]):
                break
            assert time.monotonic() < deadline, [cell["execution_count"] for cell in cells]
    said = [text for cell in cells for output in cell["outputs"] if output.get("name") == "stderr"
            if "IProgress not found" not in (text := "".join(output["text"]))]  # tqdm, where ipywidgets is not installed
    assert not said
