"""`python -m carma_lib`: run the notebooks of a profile, or copy a run's outputs into the committed notebooks."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

EPILOG = """examples:
  python -m carma_lib run                                   the embedded study (profile default)
  python -m carma_lib run --profile ci --dry-run            say what would be done, do nothing
  python -m carma_lib run --profile sst --resume            go on where a run stopped
  python -m carma_lib run --profile sst --run-dir runs/long --set batch_size=32 --set 02_finetune.seeds=[1,2,3,4]
  python -m carma_lib publish                               executed copies of runs/default → notebooks/

A run folder holds status.json, executed notebooks, data, models, results.parquet, tables, figures and
report.html. The last line printed is the report's path. Exit code 0: done; 1: stopped, with the reason in one
line; 130: interrupted, --resume goes on.
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
                     help="one parameter, over the profile's; in every notebook that has it unless one is named")
    run.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, and stop")
    how = run.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="skip what is done in the run folder")
    how.add_argument("--fresh", action="store_true", help="throw away what the run folder holds")
    commands.add_parser("publish", help="copy the executed notebooks of runs/default into notebooks/")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code."""
    from carma_lib import manifest, pipeline

    options = build_parser().parse_args(arguments)
    try:
        if options.command == "publish":
            for path in pipeline.publish():
                print(path)
            return 0
        settings = {}
        for setting in options.settings:
            name, equals, value = setting.partition("=")
            if not equals:
                raise manifest.RunError(f"--set takes NAME=VALUE, not '{setting}'")
            settings[name] = value
        plan = manifest.make_plan(options.profile, run_dir=options.run_dir, settings=settings)
        if options.dry_run:
            pipeline.check_run_folder(plan, resume=options.resume, fresh=options.fresh)
            print(manifest.describe(plan, resume=options.resume))
            return 0
        report = pipeline.execute(plan, resume=options.resume, fresh=options.fresh)
    except manifest.RunError as error:
        print(f"carma_lib: {error}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"carma_lib: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pipeline.wait_for_kernels()
        print("\ncarma_lib: interrupted; what is done is kept, --resume goes on from there", file=sys.stderr)
        return 130
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
