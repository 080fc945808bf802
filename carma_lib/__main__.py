"""`python -m carma_lib`: run the notebooks of a profile, publish a run's outputs, or sweep over many trainings."""
from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Collection
from pathlib import Path

import psutil

EPILOG = """examples:
  python -m carma_lib run                                   the embedded study (profile default)
  python -m carma_lib run --profile ci --dry-run            check everything, say what would be done, and stop
  python -m carma_lib run --profile sst --resume            go on after an interruption
  python -m carma_lib run --profile sst --run-dir runs/long --set batch_size=32 --set "02_finetune.seeds=[1,2,3,4]"
  python -m carma_lib publish                               copy the notebooks executed in runs/default to notebooks/
  python -m carma_lib sweep sweeps/example.yml --dry-run    tasks × models × methods × seeds; see sweep --help

A run folder holds status.json, executed notebooks, data, cells, results.parquet, tables, figures and report.html.
The last line printed is the report's path. Exit code 0: done; 1: stopped, with the reason in one line;
130 or 143: interrupted or terminated, --resume goes on.
"""
SWEEP_EPILOG = """examples:
  python -m carma_lib sweep sweeps/example.yml --dry-run                      cells, time and disk; does nothing
  python -m carma_lib sweep sweeps/example.yml --workers 2                    processes of this machine
  python -m carma_lib sweep my-sweep.yml --scheduler tcp://10.0.0.1:8786      a Dask cluster
  python -m carma_lib sweep my-sweep.yml --slurm sweeps/slurm.example.yml     SLURM jobs

The same command goes on after a stop: done cells are skipped, failed ones tried again. On a cluster every machine
must have this package and see the sweep's folder under the same name. Its workers have one thread each
(dask worker ADDRESS --nthreads 1 --memory-limit 0), on GPUs one worker a GPU (CUDA_VISIBLE_DEVICES=0 dask worker …).
The last line printed is the report's path. Exit code 0: every cell is done; 1: some failed, or stopped with the
reason in one line; 130 or 143: interrupted or terminated.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line; `--help` shows the examples."""
    parser = argparse.ArgumentParser(prog="python -m carma_lib", description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the notebooks of a profile in order, then make the report",
                              epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_argument("--profile", default="default", help="which set of parameters of nbs_ci.yml (default: default)")
    run.add_argument("--run-dir", type=Path, help="where everything goes (default: runs/<profile>)")
    run.add_argument("--set", action="append", default=[], metavar="[NOTEBOOK.]NAME=VALUE", dest="settings",
                     help="one parameter or one setting of the recipe, instead of the profile's")
    run.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, and stop")
    how = run.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="skip what is done in the run folder")
    how.add_argument("--fresh", action="store_true", help="throw away what the run folder holds")
    commands.add_parser("publish", help="copy the executed notebooks of runs/default into notebooks/")
    sweep = commands.add_parser("sweep", help="train and test tasks × models × methods × seeds, on one machine or many",
                                epilog=SWEEP_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    sweep.add_argument("file", type=Path, help="what to sweep over; sweeps/example.yml explains itself")
    sweep.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    sweep.add_argument("--retries", type=int, default=1, help="further attempts of a cell that failed (default: 1)")
    where = sweep.add_mutually_exclusive_group()
    where.add_argument("--workers", type=int, help="processes of this machine (default: one a GPU, 2 without GPU)")
    where.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="a Dask scheduler; its workers do the work")
    where.add_argument("--slurm", type=Path, metavar="FILE", help="submit the workers as SLURM jobs, as FILE says")
    return parser


PATIENCE = 4.0  # seconds in which a command that was told to stop may close what it has open


class _Stopped(BaseException):
    """An interruption (Ctrl-C, exit code 130) or a termination (SIGTERM, 143)."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code."""
    options = build_parser().parse_args(arguments)
    spare = {child.pid for child in psutil.Process().children()}  # of whoever called us

    def again(number: int, frame: object) -> None:
        _stopped(options, 128 + number, spare)

    def stop(number: int, frame: object) -> None:
        for kind in before:
            signal.signal(kind, again)
        late.append(threading.Timer(PATIENCE, _stopped, (options, 128 + number, spare)))  # if what is open does not close
        late[-1].daemon = True
        late[-1].start()
        end_children(spare)  # before they can print of their own interruption
        raise KeyboardInterrupt if number == signal.SIGINT else _Stopped(number)

    before, late = {}, []
    try:
        for kind in (signal.SIGINT, signal.SIGTERM):
            before[kind] = signal.signal(kind, stop)
        return _command(options)
    except (KeyboardInterrupt, _Stopped) as stopped:
        return _stopped(options, getattr(stopped, "code", 130), spare)
    finally:
        for timer in late:
            timer.cancel()
        for kind, handler in before.items():
            signal.signal(kind, handler)


def end_children(spare: Collection[int] = ()) -> None:
    """Kill the kernels and workers that this process started; what they have finished is whole, however they end.

    spare: ids of children that stay, with theirs: those of whoever called us. Python's trackers of semaphores end by
    themselves, and a new one would complain of every semaphore that it does not know.
    """
    children = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            found = [child, *child.children(recursive=True)] if child.pid not in spare else []
            children += [one for one in found if "resource_tracker" not in " ".join(one.cmdline())]
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()
    psutil.wait_procs(children, timeout=1)


def _stopped(options: argparse.Namespace, code: int, spare: set[int]) -> None:
    """End our kernels and workers, say so in the last line, and exit."""
    end_children(spare)
    way = "the same command" if options.command == "sweep" else "--resume"
    line = f"\ncarma_lib: {'interrupted' if code == 130 else 'terminated'}; what is done is kept, {way} goes on from there\n"
    os.write(2, line.encode())  # not print: the signal may have come in the middle of one
    os._exit(code)  # threads of kernels and workers that have ended would still be waited for


def _command(options: argparse.Namespace) -> int:
    from carma_lib import manifest, notebooks
    from carma_lib.files import RunError

    try:
        if options.command == "sweep":
            return _sweep(options)
        if options.command == "publish":
            print(*notebooks.publish(), sep="\n")
            return 0
        settings = {}
        for setting in options.settings:
            name, equals, value = setting.partition("=")
            if not equals:
                raise RunError(f"--set takes NAME=VALUE, not '{setting}'")
            settings[name] = value
        plan = manifest.make_plan(options.profile, run_dir=options.run_dir, settings=settings, sources=not options.dry_run)
        if options.dry_run:
            notebooks.check_run_folder(plan, resume=options.resume, fresh=options.fresh)
            print(notebooks.describe(plan, resume=options.resume))
            return 0
        print(notebooks.execute(plan, resume=options.resume, fresh=options.fresh))
        return 0
    except RunError as error:
        print(f"carma_lib: {error}", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"carma_lib: {type(error).__name__}: {error}{notebooks.if_full(str(error))}", file=sys.stderr)
    return 1


def _sweep(options: argparse.Namespace) -> int:
    from carma_lib.lab.plan import read_sweep
    from carma_lib.lab.run import check_retries, names_of
    from carma_lib.lab.sweep import Where, plan_text, run_sweep

    check_retries(options.retries)
    sweep, where = read_sweep(options.file), Where(options.workers, options.scheduler, options.slurm)
    print(plan_text(sweep, where), flush=True)
    if options.dry_run:
        return 0
    report, failed = run_sweep(sweep, where, retries=options.retries)
    print(f"{len(sweep.cells) - len(failed)} of {len(sweep.cells)} cells done")
    names = names_of(sweep.cells)
    for cell, reason in failed.items():
        print(f"  failed: {names[cell]}: {reason}")
    print(report)
    return 1 if failed else 0


if __name__ == "__main__":
    code = main()
    for ended in (signal.SIGINT, signal.SIGTERM):  # all is done, and what comes now must not say otherwise
        signal.signal(ended, signal.SIG_IGN)
    sys.exit(code)
