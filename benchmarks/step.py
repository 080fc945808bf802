"""What a training step costs with CARMA: time and peak memory, as ratios to plain fine-tuning.

One process runs every method in turn on the same batch, round after round, so that a busy machine slows all
of them alike; a ratio is the median over rounds of (method's time / plain fine-tuning's time), with a 95 %
bootstrap interval over rounds. A step is what Trainer does: forward, loss, backward, clipping, fused AdamW.
Batches are of like length and have the lengths of real texts (benchmarks/lengths.json), their tokens and the
weights are random.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from lengths import batches, read_lengths, write_lengths
from naive import PADDED_LENGTH, naive_loss, pad_to_published_length
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from carma_lib.files import whole_file
from carma_lib.losses import CarmaConfig
from carma_lib.trainer import CarmaTrainer

HERE = Path(__file__).parent
MODELS = {
    "gpt2_small": dict(n_layer=12, n_embd=768, n_head=12, vocab_size=50257),
    "small": dict(n_layer=4, n_embd=256, n_head=4, vocab_size=8192),
}
METHODS = ("fine_tuning", "carma", "mutual_information_only", "stability_only", "naive", "published")
SLOW = ("naive", "published")
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # bf16, dense, as the maker states them


class Bench:
    """One model and optimizer, with a trainer for each method; `step` runs one training step."""

    def __init__(self, model_name: str, device: str, methods: tuple[str, ...]) -> None:
        torch.manual_seed(0)
        random.seed(0)
        self.device = device
        config = GPT2Config(**MODELS[model_name], n_positions=256, bos_token_id=0, eos_token_id=0)
        self.model = GPT2LMHeadModel(config).train()
        arguments = TrainingArguments(
            tempfile.gettempdir(),
            use_cpu=device == "cpu",
            bf16=device == "cuda",
            report_to="none",
            save_strategy="no",
        )
        last = min(7, config.n_layer - 2)
        self.configs = {
            "fine_tuning": CarmaConfig(carma_weight=0),
            "carma": _carma(last, 0.2, 0.3),
            "mutual_information_only": _carma(last, 1, 0),
            "stability_only": _carma(last, 0, 1),
        }
        self.trainers = {
            name: CarmaTrainer(self.model, arguments, carma=carma, data_collator=list)
            for name, carma in self.configs.items()
            if name in methods or name == "fine_tuning"
        }
        for trainer in self.trainers.values():
            trainer.current_gradient_accumulation_steps = 1
        self.accelerator = self.trainers["fine_tuning"].accelerator
        self.wrapped = self.accelerator.prepare_model(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def step(self, method: str, batch: dict[str, torch.Tensor], padded_length: int) -> None:
        if method in SLOW:
            batch = pad_to_published_length(batch, padded_length)
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            naive_loss(self.wrapped, batch, self.configs["carma"], every_row=method == "published").backward()
        else:
            self.trainers[method].training_step(self.wrapped, batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self, method: str, batch: dict[str, torch.Tensor], padded_length: int) -> float:
        self._wait()
        start = time.perf_counter()
        self.step(method, batch, padded_length)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _carma(last: int, mi_weight: float, stability_weight: float) -> CarmaConfig:
    layers = (0, last)
    return CarmaConfig(
        mi_weight=mi_weight, stability_weight=stability_weight, mi_layers=layers, stability_layers=layers
    )


def measure_time(bench: Bench, text: str, rounds_of: list[dict], methods: list[str]) -> dict[str, np.ndarray]:
    """Seconds by method and round; a first round only warms up, and slow methods get three more."""
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for number, batch in enumerate([rounds_of[-1], *rounds_of]):
        turn = number % len(methods)
        for method in methods[turn:] + methods[:turn]:
            if method not in SLOW or number < 4:
                seconds[method].append(bench.timed(method, batch, PADDED_LENGTH[text]))
    return {method: np.array(values[1:]) for method, values in seconds.items()}


def peak_memory(model: str, device: str, method: str, text: str, batch: dict[str, torch.Tensor]) -> int:
    """Peak bytes of two steps: what torch allocated on a GPU, or all that a fresh process held on a CPU."""
    if device == "cuda":
        return _peak(model, device, method, text, batch)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (model, device, method, text, batch))


def _peak(model: str, device: str, method: str, text: str, batch: dict[str, torch.Tensor]) -> int:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        torch.set_num_threads(1)
    bench = Bench(model, device, (method,))
    for _ in range(2):
        bench.step(method, batch, PADDED_LENGTH[text])
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()  # getrusage would begin with the parent's peak
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def ratio_with_interval(seconds: np.ndarray, plain: np.ndarray) -> tuple[float, float, float]:
    """Median of the paired ratios and its 95 % percentile interval over 2,000 resamplings of the rounds."""
    ratios = seconds / plain[: len(seconds)]
    drawn = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def records(options: argparse.Namespace, report: dict, path: Path) -> list[dict]:
    """Every record the options ask for; those of an earlier, interrupted call with the same setup are kept."""
    tables, done = read_lengths(options.lengths), kept_records(path, report)
    results = []
    for model in options.models:
        vocab_size, bench = MODELS[model]["vocab_size"], None
        for text in options.texts:
            for size in options.batches:
                methods = [m for m in options.methods if m not in SLOW or size <= options.slow_up_to]
                found = [done.get((model, text, size, method, options.rounds)) for method in methods]
                if None in found:
                    bench = bench or Bench(model, options.device, METHODS)
                    rounds_of = batches(tables[text], size, options.rounds, vocab_size)
                    seconds = measure_time(bench, text, rounds_of, methods)
                    found = [_record(bench, model, text, size, method, seconds, rounds_of) for method in methods]
                results += found
                print("\n".join(map(_line, found)), flush=True)
                _write(path, report | {"results": [*results, *_not_yet(done, results)]})
        del bench
    for record in results if options.memory else []:
        on_cpu = options.device == "cpu"  # there each needs a fresh process, so only the largest batch
        if record["method"] in SLOW or "peak_bytes" in record or on_cpu and record["batch"] < max(options.batches):
            continue
        longest = batches(tables[record["text"]], record["batch"], 2, MODELS[record["model"]]["vocab_size"])[-1]
        record["peak_bytes"] = peak_memory(
            record["model"], options.device, record["method"], record["text"], longest
        )
        _write(path, report | {"results": [*results, *_not_yet(done, results)]})
    return _with_memory_ratios([*results, *_not_yet(done, results)])


def kept_records(path: Path, report: dict) -> dict[tuple, dict]:
    """(model, text, batch, method, rounds) → record of an earlier call on this device with these versions."""
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    if {name: earlier.get(name) for name in report} != report:
        return {}
    return {_key(record): record for record in earlier["results"]}


def _key(record: dict) -> tuple:
    return tuple(record[name] for name in ("model", "text", "batch", "method", "rounds_asked"))


def _not_yet(done: dict[tuple, dict], results: list[dict]) -> list[dict]:
    reached = set(map(_key, results))
    return [record for key, record in done.items() if key not in reached]


def _write(path: Path, report: dict) -> None:
    report["results"].sort(key=lambda record: (record["model"], record["text"], record["batch"]))
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")


def _record(bench, model, text, size, method, seconds, rounds_of) -> dict:
    ratio, low, high = ratio_with_interval(seconds[method], seconds["fine_tuning"])
    tokens = float(np.mean([batch["attention_mask"].sum() for batch in rounds_of]))
    median = float(np.median(seconds[method]))
    record = dict(
        model=model,
        text=text,
        batch=size,
        method=method,
        rounds=len(seconds[method]),
        rounds_asked=len(rounds_of),
        seconds=median,
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        mean_real_tokens=tokens,
    )
    peak = [
        flops for name, flops in PEAK_FLOPS.items() if bench.device == "cuda" and name in _device_name("cuda")
    ]
    if peak and method not in SLOW:
        blocks = 12 * bench.model.config.n_layer * bench.model.config.n_embd**2  # multiply-adds a token
        record["share_of_peak"] = 6 * blocks * tokens / median / peak[0]
    return record


def _with_memory_ratios(results: list[dict]) -> list[dict]:
    plain = {
        (r["model"], r["text"], r["batch"]): r.get("peak_bytes")
        for r in results
        if r["method"] == "fine_tuning"
    }
    for record in results:
        if "peak_bytes" in record:
            record["peak_ratio"] = (
                record["peak_bytes"] / plain[record["model"], record["text"], record["batch"]]
            )
    return results


def _line(record: dict) -> str:
    return (
        f"{record['model']:<11}{record['text']:<12}{record['batch']:>4}  {record['method']:<24}"
        f"{record['seconds'] * 1000:9.1f} ms  ratio {record['ratio']:6.3f} "
        f"[{record['ratio_low']:.3f}, {record['ratio_high']:.3f}]"
    )


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="quick look: python benchmarks/step.py --models small --batches 4 --rounds 5",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default=device, help="cuda runs in bf16 (default: %(default)s)"
    )
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="sizes, weights random"
    )
    parser.add_argument(
        "--texts",
        nargs="+",
        choices=list(PADDED_LENGTH),
        default=["wordnet", "sst"],
        help="whose lengths: WordNet definitions, SST sentences, or definitions cut so small that a third "
        "of the words have several tokens (many_pieces)",
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64], help="batch sizes")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS[:4]),
        help="fine_tuning is always measured; naive: pair by pair, padded to 58 or 124 tokens, all logits; "
        "published: the same with every item's words applied to every row",
    )
    parser.add_argument("--rounds", type=int, default=20, help="steps of each method (slow ones: 3)")
    parser.add_argument("--slow-up-to", type=int, default=16, help="largest batch for naive and published")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of torch on the CPU"
    )
    parser.add_argument(
        "--no-memory",
        dest="memory",
        action="store_false",
        help="leave out peak memory (on a CPU it is measured at the largest batch only)",
    )
    parser.add_argument(
        "--lengths", type=Path, default=HERE / "lengths.json", help="counts of tokens by word"
    )
    parser.add_argument(
        "--write-lengths", action="store_true", help="make that file anew from WordNet and SST, and stop"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results",
        help="folder of step_<device>.json; what it holds from the same setup is kept",
    )
    options = parser.parse_args()
    options.methods = ["fine_tuning", *(method for method in options.methods if method != "fine_tuning")]
    return options


def main() -> None:
    options = parse()
    if options.write_lengths:
        write_lengths(options.lengths)
        return
    torch.set_num_threads(options.threads)
    report = {
        "device": options.device,
        "device_name": _device_name(options.device),
        "threads": torch.get_num_threads(),
        "precision": "bf16 autocast" if options.device == "cuda" else "float32",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    path = options.out / f"step_{options.device}.json"
    report["results"] = records(options, report, path)
    _write(path, report)


if __name__ == "__main__":
    main()
