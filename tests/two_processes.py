"""Run by test_trainer.py under torchrun: the same two rows in each process, results written by the first."""

import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

from test_trainer import language_model_rows, losses, no_dropout, single_target_rows, trained, weights
from tiny import tiny_model

folder = Path(sys.argv[1])
for kind, make_rows in (("single_target", single_target_rows), ("language_model", language_model_rows)):
    model = tiny_model("gpt2")
    no_dropout(model)
    trainer = trained(
        folder,
        make_rows(2).select([0, 1] * 8),
        model,
        per_device_train_batch_size=2,
        ddp_backend="gloo",
        train_sampling_strategy="sequential",
    )
    assert trainer.args.world_size == 2
    if trainer.is_world_process_zero():
        logged = trainer.state.log_history[0]
        result = {"losses": losses(trainer), "weights": weights(trainer), "stability": logged["stability"]}
        torch.save(result, folder / f"{kind}.pt")
torch.distributed.destroy_process_group()
