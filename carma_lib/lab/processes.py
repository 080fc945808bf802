"""One training in several processes, one GPU each: `torchrun --nproc-per-node N -m carma_lib.lab.processes JOB.json`.

Weights, gradients and optimizer state are sharded (FSDP). `lab.train` writes the job and starts this.
"""
from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import psutil
import torch

from carma_lib.files import read_json
from carma_lib.lab.cell import Cell
from carma_lib.lab.train import trained


def main(job_file: str) -> None:
    """Train the cell of a job file {folder, cell, parent}; ends when the parent process does."""
    job = read_json(job_file)
    threading.Thread(target=_end_with, args=(job["parent"],), daemon=True).start()
    try:
        trained(Path(job["folder"]), Cell.of_json(job["cell"]))
    except Exception as error:
        Path(job_file).with_name("error.txt").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _end_with(parent: int) -> None:
    while psutil.pid_exists(parent):
        time.sleep(2)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
