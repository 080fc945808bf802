"""What a step costs with CARMA from short rows to long ones, on SmolLM2's shape with random weights.

    python benchmarks/long.py [--lengths 20 58 …] [--rounds 7] [--threads 2] [--no-terms]

Plain fine-tuning, CARMA with its default layers (blocks 0 to 9), and the dense terms of before take turns on one
batch. A ratio is the median over rounds of (a method's time / plain time) with its 95 % bootstrap interval, by the
clock and by processor seconds, which do not count other people's work. A step is what Trainer does: forward in bf16,
loss of all tokens, backward, clipping, fused AdamW. Peak memory is that of a fresh process after one step, the median
of three such processes, since one process's peak varies by some per cent. What a call does not measure stays in the
file: --no-terms --methods --memory-lengths 2048 measures one memory again.
"""
from __future__ import annotations

import argparse
import multiprocessing
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from dense import DenseLoss
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from carma_lib.files import read_json, write_json
from carma_lib.losses import CarmaConfig, CarmaLoss
from carma_lib.trainer import CarmaTrainer

SHAPE = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
             num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=0,
             eos_token_id=0)
TOKENS = 512  # of a batch of short rows
METHODS = ("plain", "carma", "dense")


class Bench:
    """One model, optimizer and trainer a method; `step` runs one training step."""

    def __init__(self, methods: tuple[str, ...], checkpointing: bool = False) -> None:
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        arguments = TrainingArguments(tempfile.gettempdir(), use_cpu=True, bf16=True, report_to="none",
                                      save_strategy="no")
        self.trainers = {}
        for method in methods:
            carma = CarmaConfig(carma_weight=0.0 if method == "plain" else 0.2)
            self.trainers[method] = CarmaTrainer(self.model, arguments, carma=carma, data_collator=list)
            self.trainers[method].current_gradient_accumulation_steps = 1
        self.wrapped = next(iter(self.trainers.values())).accelerator.prepare_model(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def step(self, method: str, batch: dict[str, torch.Tensor]) -> None:
        trainer = self.trainers[method]
        if method == "dense":
            trainer._carma_attach()
            trainer._carma_terms = DenseLoss(trainer.carma.for_depth(SHAPE["num_hidden_layers"]))
        trainer.training_step(self.wrapped, dict(batch))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def batch_of(length: int) -> dict[str, torch.Tensor]:
    """Random tokens; as in English text 38 % continue a word and a tenth is punctuation."""
    rows, generator = max(1, TOKENS // length), torch.Generator().manual_seed(length)
    ids = torch.randint(1, SHAPE["vocab_size"], (rows, length), generator=generator)
    words = (torch.rand(rows, length, generator=generator) < 0.62).long().cumsum(1)
    words[torch.rand(rows, length, generator=generator) < 0.1] = -1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "constituent_ids": words}


def timed(act) -> tuple[float, float]:
    """Seconds by the clock, and processor seconds of all threads."""
    clock, processor = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - clock, time.process_time() - processor


def rounds_of(acts: dict, rounds: int) -> dict[str, np.ndarray]:
    """(rounds, 2) seconds of each act; the acts take turns, and a first round only warms up."""
    names, seconds = list(acts), {name: [] for name in acts}
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(timed(acts[name]))
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def summary(seconds: np.ndarray, plain: np.ndarray) -> dict[str, float]:
    found = {"rounds": len(seconds), "seconds": float(np.median(seconds[:, 0]))}
    for column, name in enumerate(("ratio", "processor_ratio")):
        ratios = seconds[:, column] / plain[:, column]
        drawn = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
        low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
        found |= {name: float(np.median(ratios)), f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def measure_terms(length: int, rounds: int) -> dict[str, float]:
    """Forward and backward of the two terms alone, 10 layers of float32 states."""
    batch, config = batch_of(length), CarmaConfig(mi_layers=(0, 9), stability_layers=(0, 9))
    states = [torch.randn(*batch["input_ids"].shape, SHAPE["hidden_size"]).requires_grad_() for _ in range(10)]

    def act(loss):
        total = loss(config)([None, *states], batch["constituent_ids"], batch["attention_mask"]).total
        torch.autograd.grad(total, states)

    found = rounds_of({"carma": lambda: act(CarmaLoss), "dense": lambda: act(lambda c: _Alone(c))}, rounds)
    return {f"{name}_{kind}": float(np.median(values[:, column])) for name, values in found.items()
            for column, kind in enumerate(("seconds", "processor_seconds"))}


class _Alone(DenseLoss):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, read=(torch.zeros(()),), **kwargs)


def peak_of(method: str, length: int, checkpointing: bool, threads: int) -> int:
    """Peak bytes of a fresh process that runs one step."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (method, length, checkpointing, threads))


def _peak(method: str, length: int, checkpointing: bool, threads: int) -> int:
    torch.set_num_threads(threads)
    Bench((method,), checkpointing).step(method, batch_of(length))
    status = Path("/proc/self/status").read_text()  # getrusage would begin with the parent's peak
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="*", type=int, default=[20, 58, 256, 1024, 2048, 4096])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-lengths", nargs="*", type=int, default=[256, 2048, 4096])
    parser.add_argument("--no-terms", dest="terms", action="store_false", help="leave out the terms alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "long_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = {"device": "cpu", "device_name": platform.processor() or platform.machine(), "threads": options.threads,
              "precision": "bf16 autocast", "torch": torch.__version__, "transformers": transformers.__version__,
              "shape": SHAPE}
    before = read_json(options.out) or {}
    again = {"terms": options.lengths if options.terms else [], "steps": options.lengths if options.methods else [],
             "memory": options.memory_lengths}
    for part, lengths in again.items():
        report[part] = [record for record in before.get(part, ()) if record["length"] not in lengths]

    def keep(part: str, record: dict) -> None:
        report[part] = sorted([*report[part], record], key=lambda each: each["length"])
        write_json(options.out, report)
        print(part, record, flush=True)

    for length in options.lengths if options.terms else ():
        keep("terms", {"length": length, **measure_terms(length, options.rounds)})
    bench = Bench(tuple(dict.fromkeys(["plain", *options.methods]))) if options.methods else None
    for length in options.lengths if bench else ():
        batch = batch_of(length)
        acts = {method: lambda method=method: bench.step(method, batch) for method in bench.trainers}
        seconds = rounds_of(acts, options.rounds)
        for method, values in seconds.items():
            keep("steps", {"length": length, "rows": len(batch["input_ids"]), "method": method,
                           **summary(values, seconds["plain"])})
    del bench
    for length in options.memory_lengths:
        for checkpointing in (False, True):
            found = [{method: peak_of(method, length, checkpointing, options.threads) for method in ("plain", "carma")}
                     for _ in range(3)]
            peaks = {method: int(np.median([each[method] for each in found])) for method in ("plain", "carma")}
            spread = {f"{method}_of_three": sorted(each[method] for each in found) for method in peaks}
            keep("memory", {"length": length, "gradient_checkpointing": checkpointing, **peaks,
                            "ratio": peaks["carma"] / peaks["plain"], **spread})


if __name__ == "__main__":
    main()
