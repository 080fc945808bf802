"""Run a plan: the notebooks in order through papermill, one run folder, one report.

A run folder holds `status.json`, executed copies in `notebooks/`, and whatever the notebooks make. It belongs
to one set of parameters and one state of the code; `--resume` skips notebooks that are done.
"""
from __future__ import annotations

import _thread
import errno
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from carma_lib.files import PARTIAL, RunError, ignore_in_children, locked, remove_partial, sha256_of, whole_file, write_json
from carma_lib.manifest import MANIFEST, Notebook, Plan, make_plan, project_root, read_status, run_folder, source_of

__all__ = ["check_run_folder", "describe", "execute", "project_root", "publish", "run_folder", "tidy_notebook", "versions"]

#: What a run folder holds beside what the manifest names.
_OURS = {"lock", ".lock", ".lock.soft", "status.json", "notebooks", "data", "cells", "starts", "cache", "tables", "figures",
         "explained", "interventions", "study", "study_work", "pretrained", "pretrained_work", "report.html"}


def execute(plan: Plan, *, resume: bool = False, fresh: bool = False) -> Path:
    """Run the plan and return the report's path; raises `RunError` at the first failure.

    resume: skip the notebooks that are done with the same parameters and code, from the same files.
    fresh: throw away what an earlier run left in the folder.
    """
    from carma_lib.report.page import write_report

    with locked(plan.run_dir / "lock", busy=f"{plan.run_dir} is in use by another run; wait for it, or give another --run-dir"):
        status = _open_status(plan, resume=resume, fresh=fresh)
        remove_partial(plan.run_dir)
        again: set[str] = set()  # what notebooks have made in this call: those that need it run too
        for number, notebook in enumerate(plan.notebooks, start=1):
            entry = status["notebooks"][notebook.name]
            label = f"[{number}/{len(plan.notebooks)}] {notebook.name}"
            if _is_done(plan, notebook, entry, again):
                print(f"{label}: done before, skipped", flush=True)
                continue
            print(f"{label}: running", flush=True)
            _run_one(plan, notebook, status)
            again |= set(notebook.makes)
            print(f"{label}: done in {entry['seconds']:.0f} s", flush=True)
        copies = [plan.run_dir / "notebooks" / f"{notebook.name}.ipynb" for notebook in plan.notebooks]
        return write_report(plan.run_dir, notebooks=copies, title=f"CARMA: profile {plan.profile}")


def describe(plan: Plan, *, resume: bool) -> str:
    """What a run would do, for `--dry-run`: notebooks, parameters, inputs and outputs, what is done already."""
    entries, again = read_status(plan.run_dir) or {}, set[str]()
    lines = [f"profile {plan.profile} → {plan.run_dir}"]
    for notebook in plan.notebooks:
        entry = entries.get(notebook.name, {})
        done = resume and _is_done(plan, notebook, entry, again) and entry["fingerprint"] == plan.fingerprints[notebook.name]
        again |= set() if done else set(notebook.makes)
        took = f", took {entry['seconds']:.0f} s before" if entry.get("seconds") else ""
        lines.append(f"\n{notebook.name}: {'done, will be skipped' if done else 'will run'} (at most {notebook.total_seconds} s{took})")
        lines += [f"    {name} = {value!r}" for name, value in plan.parameters[notebook.name].items()]
        lines.append(f"    needs {', '.join(notebook.needs) or 'nothing'}; makes {', '.join(notebook.makes)}")
    return "\n".join(lines + ["", f"at the end: {plan.run_dir / 'report.html'}"])


def _is_done(plan: Plan, notebook: Notebook, entry: dict[str, Any], again: set[str]) -> bool:
    """Whether a notebook is done, from what is there still. again: what is made anew before it."""
    return (entry.get("state") == "done" and not again & set(notebook.needs) and not _absent(plan, notebook.makes)
            and _unchanged(plan.run_dir, entry, plan.reads[notebook.name]))


def check_run_folder(plan: Plan, *, resume: bool, fresh: bool) -> None:
    """`RunError` where the run folder holds something that this run may neither go on with nor throw away."""
    above = next(path for path in (plan.run_dir, *plan.run_dir.parents) if path.exists())
    if not above.is_dir():
        raise RunError(f"{above} is a file, so {plan.run_dir} can be no folder; give another --run-dir")
    entries = read_status(plan.run_dir)
    names = [path.name for path in plan.run_dir.iterdir() if not path.name.startswith(PARTIAL)] if plan.run_dir.is_dir() else []
    made = _OURS | {Path(made).parts[0] for notebook in plan.notebooks for made in notebook.makes}
    foreign = [name for name in names if name != "lock" and (entries is None or name not in made)]
    if not entries and foreign:
        raise RunError(f"{plan.run_dir} holds files but no run of this runner ({sorted(foreign)[0]}); give another --run-dir, "
                       "or empty it yourself")
    if entries is None:
        return
    if not (resume or fresh):
        raise RunError(f"{plan.run_dir} already holds a run; add --resume to go on with it, --fresh to start anew")
    done = {name: entry for name, entry in entries.items() if entry["state"] == "done" and name in plan.parameters}
    for name, entry in done.items() if resume else ():
        old, new = entry["parameters"], plan.parameters[name]
        if old != new:
            keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            raise RunError(f"{plan.run_dir} holds a run with other parameters ({name}: {', '.join(keys)}); "
                           "give another --run-dir, or --fresh to start anew")
        if entry["fingerprint"] != plan.fingerprints[name]:
            raise RunError(f"{plan.run_dir} was made by another state of the code or notebooks (first: {name}); "
                           "--fresh starts anew, another --run-dir keeps both")


def _open_status(plan: Plan, *, resume: bool, fresh: bool) -> dict[str, Any]:
    check_run_folder(plan, resume=resume, fresh=fresh)
    entries = read_status(plan.run_dir)
    if entries is None or fresh:
        for path in plan.run_dir.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        entries = {}
    elif not entries:
        print(f"{plan.run_dir / 'status.json'} is damaged: every notebook runs again, finished cells are kept", flush=True)
    status = {"profile": plan.profile, "notebooks": entries}
    for name, mark in plan.fingerprints.items():
        if status["notebooks"].get(name, {}).get("state") != "done":
            status["notebooks"][name] = {"state": "waiting", "fingerprint": mark,
                                         "parameters": plan.parameters[name]}
    write_json(plan.run_dir / "status.json", status)
    return status


def _absent(plan: Plan, patterns: Iterable[str]) -> list[str]:
    """The patterns that nothing whole in the run folder fits; hidden names are files half written."""
    return [pattern for pattern in patterns
            if not any(all(not part.startswith(".") for part in path.relative_to(plan.run_dir).parts)
                       for path in plan.run_dir.glob(pattern))]


def _marks(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Each file, of folders those in them, by its path from `folder` → its content's mark."""
    whole = [each for file in files for each in (sorted(file.glob("[!.]*")) if file.is_dir() else [file]) if each.is_file()]
    return {Path(os.path.relpath(each, folder)).as_posix(): sha256_of(each) for each in whole}


def _unchanged(run_dir: Path, entry: dict[str, Any], reads: list[Path]) -> bool:
    """Whether what a notebook made and read has its content still; the first file that has not is named."""
    for kind in ("made", "read"):
        before = entry.get(kind)
        if not isinstance(before, dict):  # of an earlier version, or damaged
            continue
        now = _marks(run_dir, reads if kind == "read" else [run_dir / name for name in before])
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                print(f"{os.path.normpath(run_dir / name)} is not as it was {kind}: its notebook runs again", flush=True)
                return False
    return True


def _run_one(plan: Plan, notebook: Notebook, status: dict[str, Any]) -> None:
    import papermill
    from nbclient.exceptions import CellTimeoutError

    entry = status["notebooks"][notebook.name]
    missing = _absent(plan, notebook.needs)
    if missing:
        raise RunError(f"{notebook.name} needs {missing[0]} in {plan.run_dir}, which is not there; "
                       "run the notebooks before it")

    def record(state: str, **facts: Any) -> None:
        entry.update(state=state, seconds=round(time.monotonic() - started, 1), **facts)
        write_json(plan.run_dir / "status.json", status)

    started = time.monotonic()
    record("running")
    copy = plan.run_dir / "notebooks" / f"{notebook.name}.ipynb"
    failed = copy.with_suffix(".failed.ipynb")
    failed.unlink(missing_ok=True)
    out_of_time = threading.Event()
    watch = threading.Timer(notebook.total_seconds, lambda: (out_of_time.set(), _thread.interrupt_main()))
    watch.daemon = True
    with whole_file(copy) as temporary:
        watch.start()
        try:
            papermill.execute_notebook(
                str(notebook.path), str(temporary), parameters=plan.parameters[notebook.name],
                kernel_name="python3", cwd=str(notebook.path.parent.parent), progress_bar=True,
                stdout_file=sys.stdout, stderr_file=sys.stderr, execution_timeout=notebook.cell_seconds,
                config=_kernel_config())
        except BaseException as error:
            tidy_notebook(temporary)
            temporary.replace(failed)
            if not isinstance(error, Exception) and not out_of_time.is_set():
                record("interrupted")
                raise
            where, why = _failure(error, notebook, out_of_time.is_set(), isinstance(error, CellTimeoutError))
            record("failed", error=f"{where}: {why}")
            raise RunError(f"{notebook.name}, {where}: {why}\n  executed so far: {failed}") from error
        finally:
            watch.cancel()
        tidy_notebook(temporary)
    if _absent(plan, notebook.makes):
        record("failed", error="it ran, but did not make what the manifest says")
        raise RunError(f"{notebook.name} ran, but did not make {', '.join(notebook.makes)} in {plan.run_dir}")
    record("done", made=_marks(plan.run_dir, [path for pattern in notebook.makes for path in sorted(plan.run_dir.glob(pattern))]),
           read=_marks(plan.run_dir, plan.reads[notebook.name]))


def _kernel_config() -> Any:
    """Kernels talk over local sockets where there are such: no open port, and no warning about one.

    Nor do they warn that bars are text for want of widgets.
    """
    from traitlets.config import Config

    ignore_in_children("ignore:IProgress not found")
    place = f"{tempfile.gettempdir()}/carma-{os.getpid()}"
    if os.name != "posix" or len(place.encode()) > 95:  # a socket's path has at most 107 bytes
        return Config()
    return Config({"KernelManager": {"transport": "ipc", "ip": place}})


def _failure(error: BaseException, notebook: Notebook, out_of_time: bool, cell_timeout: bool) -> tuple[str, str]:
    """Where and why a notebook stopped, each in a few words."""
    import papermill

    if out_of_time:
        return "total time", f"not done after {notebook.total_seconds} s; raise total_seconds in {MANIFEST}"
    if cell_timeout:
        return "cell time", f"a cell ran longer than {notebook.cell_seconds} s; raise cell_seconds in {MANIFEST}"
    if isinstance(error, papermill.PapermillExecutionError):
        why = f"{error.ename}: {error.evalue}"
        return f"cell [{error.exec_count}]", why + if_full(why)
    return "while running", f"{type(error).__name__}: {error}{if_full(str(error))}"


def if_full(message: str) -> str:
    """What to do, where the message of an error tells of a full disk; else nothing."""
    full = os.strerror(errno.ENOSPC) in message
    return "; free space and go on with --resume, or give a --run-dir on another disk" if full else ""


def tidy_notebook(path: Path) -> None:
    """Drop progress bars, widget state and papermill's own records; join streams that papermill cut in pieces."""
    import nbformat
    from nbconvert.preprocessors.coalescestreams import CoalesceStreamsPreprocessor

    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError):  # nothing was written yet
        return
    notebook.metadata = {key: value for key, value in notebook.metadata.items()
                         if key in ("kernelspec", "language_info")}
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not (
                any("widget" in kind for kind in output.get("data", {})) or output.get("name") == "stderr"
                and ("\r" in output.text or "IProgress not found" in output.text))]
            CoalesceStreamsPreprocessor().preprocess_cell(cell, {}, 0)
            cell.outputs = [output for output in cell.outputs if output.get("text", "x").strip()]
    nbformat.write(notebook, path)


def publish() -> list[Path]:
    """Copy the executed notebooks of the finished default run into `notebooks/`, once all of them are done.

    Raises `RunError` if a notebook is not done, or it or the library has changed since.
    """
    plan = make_plan("default")
    entries = read_status(plan.run_dir) or {}
    copies = {notebook: plan.run_dir / "notebooks" / f"{notebook.name}.ipynb" for notebook in plan.notebooks}
    for notebook, copy in copies.items():
        entry = entries.get(notebook.name, {})
        if entry.get("state") != "done":
            raise RunError(f"{notebook.name} is not done in {plan.run_dir}; finish the run first")
        if entry["fingerprint"] != plan.fingerprints[notebook.name] or source_of(copy) != source_of(notebook.path):
            raise RunError(f"{notebook.name} or the library has changed since the run in {plan.run_dir}; "
                           "run it again")
    for notebook, copy in copies.items():
        with whole_file(notebook.path) as temporary:
            temporary.write_bytes(copy.read_bytes())
    return [notebook.path for notebook in copies]


def versions() -> str:
    """The machine and the versions a notebook was run with, in one line."""
    import platform
    from importlib.metadata import version

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores, no GPU"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "datasets", "pandas"))
    return f"{device}; Python {platform.python_version()}, {packages}"
