"""Run by test_trainer.py under torchrun: the same two rows in each process, results written by the first."""

import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

from test_trainer import KINDS, logged, trained_in, weights

folder = Path(sys.argv[1])
for kind, (make_rows, method) in KINDS.items():
    trainer = trained_in(folder, make_rows, method, ddp_backend="gloo", per_device_train_batch_size=2)
    assert trainer.args.world_size == 2
    if trainer.is_world_process_zero():
        torch.save({"logged": logged(trainer), "weights": weights(trainer)}, folder / f"{kind}.pt")
torch.distributed.destroy_process_group()
