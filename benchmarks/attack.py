"""An attack on runs and sweeps that anyone can repeat: kills, full disks, bad inputs; a table of what held.

    make attack                                  50 kills, seed 0: hours on two cores
    make attack ARGS="--kills 5"                 a try
    python benchmarks/attack.py --only inputs    one part: inputs, folders, kills

Kills come at random moments over a small run (notebooks 1 to 4, four cells) and a small sweep (four cells), by turns:
of their parents (SIGKILL, SIGTERM, SIGINT, each also twice), kernels and workers (SIGKILL). After each the same command
goes on. Then the tables must be those of an unbroken one, bit for bit, times aside, and 20 s later no process is left.
Writes benchmarks/results/attack.csv.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bad_inputs
import pandas as pd
import psutil

ROOT = Path(__file__).resolve().parent.parent
MARK = "CARMA_ATTACK"  # in the environment of every process that an attack starts
SWEEP = """run_dir: {folder}
tasks: [controlled_sentiment]
models: [random]
methods: [fine_tuning, carma]
seeds: [1, 2]
settings: {{steps: {{sentiment: 30}}, test_at: {{sentiment: [10]}}, layers: 2, width: 32, heads: 2, batch_size: 8, warmup_steps: 0, mi_layers: [0, 1],
           stability_layers: [0, 1], validation_items: 20, evaluations: 3}}
conditions: {{rates: [0.25], depth_shares: [1.0], protocols: [mean], levels: [word], test_items: 20, pooled_items: 20, measures: []}}
"""
RUN = ["tasks=['controlled_sentiment']", "further_tasks=[]", "seeds=[1, 2]", "steps={'sentiment': 30}",
       "02_finetune.recipe={'layers': 2, 'width': 32, 'mi_layers': [0, 1], 'stability_layers': [0, 1], 'batch_size': 8, 'warmup_steps': 0, "
       "'evaluations': 3, 'validation_items': 20, 'test_at': [10]}",
       "03_evaluate.test_items=20", "pooled_items=20", "03_evaluate.rates=[0.25]", "depth_shares=[1.0]", "03_evaluate.levels=['word']", "workers=1"]
PARENT = [(signal.SIGKILL, 1), (signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGINT, 2)]


def project(folder: Path) -> Path:
    """A copy of the clone with a manifest of notebooks 1 to 4 and one small profile."""
    import yaml

    for name in ("notebooks", "data"):
        (folder / name).symlink_to(ROOT / name)
    manifest = yaml.safe_load((ROOT / "nbs_ci.yml").read_text(encoding="utf-8"))
    (folder / "nbs_ci.yml").write_text(yaml.safe_dump({"notebooks": manifest["notebooks"][:4], "profiles": {"small": {}}}))
    return folder


class Target:
    """A command that goes on after every stop, and the tables that it makes."""

    def __init__(self, name: str, work: Path) -> None:
        self.name, self.work, self.folder = name, work, work / name
        if name == "sweep":
            (work / "sweep.yml").write_text(SWEEP.format(folder=self.folder))
            self.command = [sys.executable, "-m", "carma_lib", "sweep", str(work / "sweep.yml"), "--workers", "1"]
        else:
            settings = [word for setting in RUN for word in ("--set", setting)]
            self.command = [sys.executable, "-m", "carma_lib", "run", "--profile", "small", "--run-dir", str(self.folder), "--resume", *settings]

    def start(self, log: Path, folder: Path | None = None) -> subprocess.Popen:
        """The command in a session of its own, with the handling of Ctrl-C that a shell in front would give."""
        with open(log, "wb") as file:
            return subprocess.Popen(
                self.command, cwd=self.work, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, MARK: self.name, "PYTHONPATH": str(ROOT)}, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    def tables(self) -> dict[str, bytes]:
        """Every table, without times: Parquet as sorted text, CSV as it is."""
        found = {}
        for file in sorted([*self.folder.glob("*.parquet"), *self.folder.glob("tables/*.csv")]):
            if file.suffix == ".parquet":
                table = pd.read_parquet(file)
                table = table.drop(columns=[name for name in table if "seconds" in name])
                found[file.name] = table.to_csv(index=False, float_format=None).encode()
            else:
                found[file.name] = file.read_bytes()
        return found


def processes(name: str) -> list[psutil.Process]:
    """The living processes of an attacked command, whoever their parents are now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == name and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _kind(process: psutil.Process, parent: int) -> str:
    if process.pid == parent:
        return "parent"
    with contextlib.suppress(psutil.Error):
        line = " ".join(process.cmdline())
        return "kernel" if "ipykernel" in line else "worker" if "spawn_main" in line else ""
    return ""


def left_after(name: str, seconds: float = 20) -> int:
    """Processes that are still there after so long; they are ended then."""
    until = time.monotonic() + seconds
    while (living := processes(name)) and time.monotonic() < until:
        time.sleep(0.5)
    for process in living:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return len(living)


def _left(name: str) -> list[str]:
    left = left_after(name)
    return [f"{left} processes left"] if left else []


def strike(target: Target, child: subprocess.Popen, log: Path, moment: float, draw: random.Random) -> dict[str, Any] | None:
    """One kill at a moment; None if the command had ended before. `wrong` says what did not hold."""
    begun = time.monotonic()
    while time.monotonic() - begun < moment:
        if child.poll() is not None:
            return None
        time.sleep(0.05)
    by_kind: dict[str, list[psutil.Process]] = {}
    for process in processes(target.name):
        by_kind.setdefault(_kind(process, child.pid), []).append(process)
    by_kind.pop("", None)
    if child.poll() is not None or "parent" not in by_kind:
        return None
    kind = draw.choice(sorted(by_kind))
    number, times = draw.choice(PARENT) if kind == "parent" else (signal.SIGKILL, 1)
    victim, sent = draw.choice(by_kind[kind]), time.monotonic()
    for again in range(times):
        with contextlib.suppress(psutil.Error):
            victim.send_signal(number)
        if again + 1 < times:
            time.sleep(0.5)
    fact = {"target": target.name, "killed": kind, "signal": number.name + (" twice" if times == 2 else ""), "moment": round(moment, 1)}
    if kind != "parent":
        return {**fact, "wrong": ""}
    try:
        code = child.wait(30)
    except subprocess.TimeoutExpired:
        return {**fact, "wrong": "still running after 30 s"}
    took, wrong = time.monotonic() - sent, []
    if number != signal.SIGKILL and code:  # 0: it had ended by itself before the signal came
        last = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()[-1:]
        wrong += [f"exit code {code}"] * (code != 128 + number) + [f"{took:.1f} s to end"] * (took > 5)
        wrong += [f"last line: {''.join(last)[-200:]!r}"] * (not last or not last[0].startswith("carma_lib: "))
        wrong += ["a traceback"] * ("Traceback" in log.read_text(errors="replace"))
    wrong += _left(target.name)
    return {**fact, "seconds": round(took, 1), "wrong": "; ".join(wrong)}


def kills(work: Path, number: int, seed: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """`number` kills by turns over the targets; each is finished at the end and compared with an unbroken one."""
    draw = random.Random(seed)
    targets = {name: Target(name, work) for name in names}
    whole: dict[str, dict[str, bytes]] = {}
    length: dict[str, float] = {}
    for name, target in targets.items():
        begun = time.monotonic()
        code = target.start(work / f"{name}.log").wait()
        whole[name], length[name] = target.tables(), time.monotonic() - begun
        print(f"{name}, unbroken: exit code {code}, {length[name]:.0f} s, {len(whole[name])} tables", flush=True)
        if code or not whole[name]:
            raise SystemExit(f"the unbroken {name} failed: {(work / f'{name}.log').read_text()[-600:]}")
        shutil.rmtree(target.folder)
    shares = {name: number // len(names) + (place < number % len(names)) for place, name in enumerate(names)}
    for name, target in targets.items():
        done = 0
        while done < shares[name]:
            log = work / f"{name}-{done}.log"
            child = target.start(log)
            struck = strike(target, child, log, draw.uniform(0.15, 0.9) * length[name], draw)
            if struck:
                done += 1
                yield {"part": "kills", **struck}
                print(f"{name} kill {done}: {struck}", flush=True)
            code = child.wait()
            if code == 0:
                yield _compared(target, whole[name], done)
                shutil.rmtree(target.folder)
        for attempt in range(3):
            code = target.start(work / f"{name}-end.log").wait()
            if code == 0:
                break
        yield _compared(target, whole[name], done) if code == 0 else {
            "part": "kills", "target": name, "wrong": f"does not finish: {(work / f'{name}-end.log').read_text()[-300:]}"}


def _compared(target: Target, whole: dict[str, bytes], after: int) -> dict[str, Any]:
    found = target.tables()
    different = [name for name in {**whole, **found} if whole.get(name) != found.get(name)]
    partial = [str(path) for path in target.folder.rglob(".partial-*")]
    wrong = [f"other tables: {', '.join(different)}"] * bool(different) + [f"left behind: {partial[:2]}"] * bool(partial)
    wrong += _left(target.name)
    return {"part": "kills", "target": target.name, "killed": "", "signal": f"finished after {after} kills", "wrong": "; ".join(wrong)}


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[bool]:
    """A disk in memory at a folder; False if this user may not mount one."""
    folder.mkdir()
    right = bool(shutil.which("mount")) and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode
    try:
        yield right
    finally:
        if right:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _ended(target: Target, log: Path, expected: str, limit: int | None = None) -> dict[str, Any]:
    """How a command ended that cannot work: exit code 1 and one line that says why."""
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    with open(log, "wb") as file:
        code = subprocess.run(target.command, cwd=target.work, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                              env={**os.environ, MARK: target.name, "PYTHONPATH": str(ROOT)}, preexec_fn=limited if limit else None).returncode
    text = log.read_text(errors="replace").replace("\r", "\n")
    said = [line for line in text.splitlines() if line.startswith("carma_lib: ")]
    wrong = [f"exit code {code}"] * (code != 1) + [f"{len(said)} lines: {said[:2]}"] * (len(said) != 1)
    wrong += [f"not told: {said}"] * (not any(word in " ".join(said) for word in expected.split("|")))
    wrong += ["a traceback"] * ("Traceback" in text and target.name == "sweep") + _left(target.name)
    return {"part": "folders", "target": target.name, "wrong": "; ".join(wrong)}


def folders(work: Path, names: list[str]) -> Iterator[dict[str, Any]]:
    """A full disk, a read-only folder, and two runs in one folder."""
    for name in names:
        target = Target(name, work)
        with mounted(target.folder, "size=300k") as small:
            yield {**_ended(target, work / "full.log", "No space|File too large|disk is full|needs about", None if small else 200_000),
                   "killed": "full disk of 300 kB" if small else "files of 200 kB at most"}
        shutil.rmtree(target.folder, ignore_errors=True)
        with mounted(target.folder, "ro,size=64m") as fixed:
            if not fixed:
                target.folder.chmod(0o555)
            if fixed or os.geteuid():
                yield {**_ended(target, work / "fixed.log", "Read-only|Permission denied"), "killed": "read-only folder"}
        target.folder.rmdir()
        first = target.start(work / "first.log")
        while first.poll() is None and not any(target.folder.glob("cells/lock")) and not (target.folder / "lock").exists():
            time.sleep(0.2)
        time.sleep(1)
        yield {**_second(target, work / "second.log", first), "killed": "second in one folder"}
        shutil.rmtree(target.folder, ignore_errors=True)


def _second(target: Target, log: Path, first: subprocess.Popen) -> dict[str, Any]:
    second = target.start(log)
    code = second.wait()
    said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("carma_lib: ")]
    alive = first.poll() is None
    first.send_signal(signal.SIGTERM)
    first.wait()
    wrong = [f"exit code {code}"] * (code != 1) + [f"said {said}"] * (len(said) != 1 or "is in use" not in said[0]) + ["the first ended"] * (not alive)
    wrong += _left(target.name)
    return {"part": "folders", "target": target.name, "wrong": "; ".join(wrong)}


def inputs(work: Path) -> Iterator[dict[str, Any]]:
    """Every bad input at every door."""
    for door in bad_inputs.DOORS:
        folder = work / door.replace(" ", "-")
        folder.mkdir()
        number, wrong = bad_inputs.faults(door, folder)
        yield {"part": "inputs", "target": door, "killed": f"{number} bad inputs", "wrong": "; ".join(f"{name}: {why}" for name, why in wrong.items())}


def main() -> int:
    """The attack; 1 if anything did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("inputs", "folders", "kills"))
    parser.add_argument("--targets", default="sweep,run", help="which commands are struck")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "attack.csv")
    options = parser.parse_args()
    names, rows, begun = options.targets.split(","), [], time.monotonic()
    print(f"seed {options.seed}, {options.kills} kills over {', '.join(names)}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory(prefix="carma-attack-") as temporary:
        work = project(Path(temporary))
        os.chdir(ROOT)
        parts = {"inputs": lambda: inputs(work), "folders": lambda: folders(work, names),
                 "kills": lambda: kills(work, options.kills, options.seed, names)}
        for name, part in parts.items():
            if options.only in (None, name):
                for row in part():
                    rows.append(row)
                    pd.DataFrame(rows).to_csv(options.out, index=False)  # what is known so far, should this be stopped
    table = pd.DataFrame(rows).rename(columns={"killed": "what", "signal": "how"})
    table.insert(0, "seed", options.seed)
    table.to_csv(options.out, index=False)
    print(table.fillna("").to_string(index=False))
    failed = int((table["wrong"].fillna("") != "").sum())
    print(f"{len(table) - failed} of {len(table)} held, {time.monotonic() - begun:.0f} s; {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
