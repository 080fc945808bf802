"""Clean, replaced and pooled runs of a trained model → the long result table, one row an item and condition.

The answer is the single most likely token of the whole vocabulary after the prompt's last token (as published:
exact match, no restriction to the task's labels).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pandas as pd
import torch

from carma_lib.collate import Collator, encode
from carma_lib.lab.drift import compare_with_start
from carma_lib.lab.experiment import Cell, run_parallel, task_prompt
from carma_lib.files import fingerprint, read_json, whole_file
from carma_lib.models import Prompt, load_config, load_model, load_tokenizer
from carma_lib.synonyms.replacement import replaced_rows
from carma_lib.pooling import PROTOCOLS, pooling_grid, start_layers_from_depth
from carma_lib.stats.table import RESULT_COLUMNS, read_results, write_results
from carma_lib.tasks import load_task, task_named

LEVELS = ("word", "phrase")


@dataclass(frozen=True)
class Conditions:
    """Under what a model is evaluated.

    splits: of the task, every test split if empty. rates: shares of content words replaced; the clean run is
    always made. depth_shares: where pooling starts, as shares of depth. test_items: first so many of each
    split, 0 for all; pooled_items: of these, the first so many are pooled too (the grid of layers, protocols
    and levels costs more than all the rest), 0 for all. replacement_seed: one for all models, so that all read the same changed texts.
    """

    rates: tuple[float, ...] = (0.1, 0.25, 0.4)
    depth_shares: tuple[float, ...] = (0.5, 0.75, 1.0)
    protocols: tuple[str, ...] = PROTOCOLS
    levels: tuple[str, ...] = LEVELS
    splits: tuple[str, ...] = ()
    test_items: int = 0
    pooled_items: int = 0
    replacement_seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if any(not 0 < rate <= 1 for rate in self.rates):
            raise ValueError(f"rates must lie in (0, 1], not {self.rates}")
        if any(not 0 < share <= 1 for share in self.depth_shares):
            raise ValueError(f"depth_shares must lie in (0, 1], not {self.depth_shares}")
        for name, known in (("protocols", PROTOCOLS), ("levels", LEVELS)):
            if unknown := set(getattr(self, name)) - set(known):
                raise ValueError(f"unknown {name} {sorted(unknown)}; there are {', '.join(known)}")
        if self.depth_shares and not (self.protocols and self.levels):
            raise ValueError("pooling needs protocols and levels; leave depth_shares empty for none")
        if self.batch_size < 1 or self.test_items < 0 or self.pooled_items < 0:
            raise ValueError("batch_size must be at least 1, test_items and pooled_items at least 0")


def evaluation_rows(run_dir: Path, task: str, conditions: Conditions) -> dict[str, datasets.Dataset]:
    """The splits to evaluate. `ValueError` for one that the task does not have."""
    rows = load_task(run_dir / "data" / task)
    splits = conditions.splits or tuple(name for name in rows if name.startswith("test"))
    if unknown := [split for split in splits if split not in rows]:
        raise ValueError(f"{task} has no split '{unknown[0]}'; it has {', '.join(rows)}")
    kept = {split: rows[split] for split in splits}
    if conditions.test_items:
        kept = {split: items.select(range(min(conditions.test_items, len(items)))) for split, items in kept.items()}
    return kept


def answerable(rows: datasets.Dataset, tokenizer: Any, prompt: Prompt) -> datasets.Dataset:
    """The rows whose answer is one token after the prompt (as published, so test sets differ by tokenizer).

    Raises `ValueError` where there is none.
    """
    kept = encode(rows, tokenizer, prefix=prompt.prefix, suffix=prompt.suffix, drop=True)
    if not len(kept):
        raise ValueError(f"none of {len(rows)} items has an answer of one token of this tokenizer; take more items "
                         "or another start")
    return kept.select_columns(rows.column_names)


def asked_rows(run_dir: Path, start: Cell, conditions: Conditions) -> dict[str, datasets.Dataset]:
    """The `evaluation_rows` that models from this untuned cell are asked: for a pretrained one the `answerable`."""
    folder = run_dir / "models" / start.place
    rows, begun = evaluation_rows(run_dir, start.task, conditions), read_json(folder / "cell.json")["start"]
    if begun == "random":
        return rows
    prompt, tokenizer = task_prompt(start.task, load_config(str(folder)).model_type, begun), load_tokenizer(str(folder))
    return {split: answerable(items, tokenizer, prompt) for split, items in rows.items()}


def make_replacements(run_dir: Path, start: Cell, conditions: Conditions) -> None:
    """Replace synonyms once, so that all models from this untuned cell find the texts in the cache."""
    for rows in asked_rows(run_dir, start, conditions).values():
        for rate in conditions.rates:
            replaced_rows(rows, rate=rate, seed=conditions.replacement_seed, cache_dir=run_dir / "cache",
                          **task_named(start.task).replacement(rows))


def evaluate_model(model: Any, tokenizer: Any, rows: datasets.Dataset, *, prompt: Prompt,
                   replaced: dict[float, tuple[datasets.Dataset, list[int]]],
                   conditions: Conditions) -> pd.DataFrame:
    """All conditions of one split: item_id, target and the columns from `condition` on of the result table."""
    shares = shares_by_layer(model.config.get_text_config().num_hidden_layers, conditions.depth_shares)

    def asked(items: datasets.Dataset, shares: dict[int, float], level: str) -> pd.DataFrame:
        prompts = prompts_of(items, tokenizer, prompt, level=level, batch_size=conditions.batch_size)
        return answers(model, tokenizer, prompts, shares=shares, protocols=conditions.protocols, level=level)

    parts = [asked(rows, {}, "word")]
    pooled = rows.select(range(min(conditions.pooled_items or len(rows), len(rows))))
    for level in conditions.levels if conditions.depth_shares and conditions.protocols else ():
        parts.append(asked(pooled, shares, level))
    for rate, (texts, changed) in replaced.items():
        parts.append(asked(texts, {}, "word").assign(condition="replaced", rate=rate, changed=changed))
    return pd.concat(parts, ignore_index=True)


def shares_by_layer(depth: int, depth_shares: Sequence[float]) -> dict[int, float]:
    """Start layer → share of depth; of shares that name one layer the first is kept."""
    layers = start_layers_from_depth(depth, depth_shares)
    return {layer: share for layer, share in zip(reversed(layers), reversed(depth_shares))}


class Prompts(NamedTuple):
    """Rows as padded batches of like length, made once for any number of models: `places` are rows' numbers."""

    item_ids: list[str]
    targets: list[str]
    places: list[list[int]]
    batches: list[dict[str, torch.Tensor]]


def prompts_of(rows: datasets.Dataset, tokenizer: Any, prompt: Prompt, *, level: str = "word",
               batch_size: int = 64) -> Prompts:
    """The encoded rows of a split (see `collation.encode`) in batches, short ones first."""
    encoded = encode(rows, tokenizer, prefix=prompt.prefix, suffix=prompt.suffix, level=level).to_list()
    order = sorted(range(len(encoded)), key=lambda row: encoded[row]["length"])
    places = [order[first:first + batch_size] for first in range(0, len(order), batch_size)]
    collate = Collator(tokenizer)
    return Prompts(list(rows["item_id"]), list(rows["target"]), places,
                   [collate([encoded[place] for place in some]) for some in places])


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: Prompts, *, shares: dict[int, float] | None = None,
            protocols: Sequence[str] = PROTOCOLS, level: str = "word") -> pd.DataFrame:
    """Clean answers without `shares` (start layer → share of depth), else pooled ones by layer and protocol.

    Columns: item_id, target, and those from `condition` on of the result table, but `source`.
    """
    device, shares = next(model.parameters()).device, shares or {}
    pieces: dict[tuple[int, str], list[pd.DataFrame]] = {}
    model.eval()
    for places, batch in zip(prompts.places, prompts.batches):
        batch = {name: value.to(device) for name, value in batch.items()}
        grid = pooling_grid(model, batch["input_ids"], batch["attention_mask"], batch["constituent_ids"],
                            start_layers=list(shares), protocols=protocols if shares else ())
        changed = grid.changed.cpu().numpy() if shares else 0
        for key, logits in (grid.pooled if shares else {(-1, ""): grid.clean}).items():
            pieces.setdefault(key, []).append(_score(logits, batch["target_ids"]).assign(
                row=places, changed=changed))
    frames = []
    for (layer, protocol), piece in pieces.items():
        frame = pd.concat(piece).sort_values("row")
        frames.append(frame.drop(columns="row").assign(
            item_id=prompts.item_ids, target=prompts.targets, condition="pooled" if shares else "clean", rate=0.0,
            start_layer=layer, depth_share=shares.get(layer, float("nan")), protocol=protocol,
            level=level if shares else ""))
    table = pd.concat(frames, ignore_index=True)
    words = {token: tokenizer.decode([token]).strip() for token in table["prediction"].unique()}
    return table.assign(prediction=table["prediction"].map(words))


def _score(logits: torch.Tensor, targets: torch.Tensor) -> pd.DataFrame:
    """Prediction (token id) and its probability, correctness, rank and log-probability of the target, from logits."""
    if not torch.isfinite(logits).all():
        raise ValueError("the model's logits are not finite; it was not trained well, or its weights are damaged")
    log_probability = logits.float().log_softmax(-1)
    of_target = log_probability.gather(1, targets[:, None])
    prediction = log_probability.argmax(-1)
    return pd.DataFrame({
        "prediction": prediction.cpu().numpy(), "correct": (prediction == targets).cpu().numpy(),
        "prediction_probability": log_probability.amax(-1).double().exp().cpu().numpy(),
        "rank": (1 + (log_probability > of_target).sum(-1)).cpu().numpy(),
        "log_probability": of_target[:, 0].double().cpu().numpy()})


def evaluate_cell(run_dir: Path, cell: Cell, conditions: Conditions) -> Path:
    """Evaluate one cell on the task's test splits; its part of the table, kept if already made.

    An untuned model of random weights is asked the unchanged items only.
    """
    folder = run_dir / "models" / cell.place
    facts = read_json(folder / "cell.json")
    if facts is None:
        raise FileNotFoundError(f"no finished model in {folder}: run notebook 02 first")
    if facts["start"] == "random" and not facts["budget"]:  # it knows no answer that it could keep
        conditions = replace(conditions, rates=(), depth_shares=())
    mark = fingerprint(facts["mark"], asdict(conditions))
    path = run_dir / "parts" / cell.place.with_suffix(f".{mark}.parquet")
    if path.is_file():
        return path
    model, tokenizer = load_model(str(folder))
    _on_device(model)
    prompt = task_prompt(cell.task, model.config.model_type, facts["start"])
    parts = []
    for split, rows in asked_rows(run_dir, replace(cell, method="untuned"), conditions).items():
        replaced = {rate: replaced_rows(rows, rate=rate, seed=conditions.replacement_seed, cache_dir=run_dir / "cache",
                                        **task_named(cell.task).replacement(rows)) for rate in conditions.rates}
        parts.append(evaluate_model(model, tokenizer, rows, prompt=prompt, replaced=replaced,
                                    conditions=conditions).assign(split=split))
    frame = pd.concat(parts, ignore_index=True).assign(
        task=cell.task, method=cell.method, seed=cell.seed, model=facts["model"], budget=facts["budget"],
        start=facts["start"])
    frame["source"] = (frame["condition"] == "replaced").map({True: task_named(cell.task).synonyms, False: ""})
    write_results(frame[[*RESULT_COLUMNS, "prediction_probability"]], path)
    return path


def _on_device(model: torch.nn.Module) -> None:
    """To the GPU where there is one; a quantised model is there already."""
    if torch.cuda.is_available() and not getattr(model, "is_loaded_in_4bit", False):
        model.to("cuda")


def evaluate_cells(run_dir: Path, cells: Sequence[Cell], conditions: Conditions, *, workers: int = 1) -> Path:
    """Evaluate every cell in `workers` processes and write the whole table, `results.parquet`."""
    for cell in {cell.task: cell for cell in cells}.values():
        make_replacements(run_dir, replace(cell, method="untuned"), conditions)
    parts = run_parallel(evaluate_cell, [(run_dir, cell, conditions) for cell in cells], workers=workers,
                         description=f"evaluating {len(cells)} models", unit="model")
    return write_results(read_results(parts), run_dir / "results.parquet")


def drift_of_cell(run_dir: Path, cell: Cell, items: int) -> pd.DataFrame:
    """`compare_with_start` of a trained cell on the first `items` validation rows that it can answer in one token."""
    model, tokenizer = load_model(str(run_dir / "models" / cell.place))
    start, _ = load_model(str(run_dir / "models" / replace(cell, method="untuned").place))
    _on_device(model)
    _on_device(start)
    facts = read_json(run_dir / "models" / cell.place / "cell.json")
    rows = load_task(run_dir / "data" / cell.task)["validation"]
    prompt = task_prompt(cell.task, model.config.model_type, facts["start"])
    rows = answerable(rows.select(range(min(20 * items, len(rows)))), tokenizer, prompt)
    rows = rows.select(range(min(items, len(rows))))
    drift, perplexity = compare_with_start(model, start, tokenizer, rows, prompt=prompt)
    return drift.assign(**asdict(cell), perplexity=perplexity["model"], start_perplexity=perplexity["start"])


def drift_of_cells(run_dir: Path, cells: Sequence[Cell], *, items: int = 200, workers: int = 1) -> pd.DataFrame:
    """Drift and perplexities of every trained cell, also as `drift.csv`: a row a cell and layer."""
    trained = [cell for cell in cells if cell.method != "untuned"]
    parts = run_parallel(drift_of_cell, [(run_dir, cell, items) for cell in trained], workers=workers,
                         description=f"drift of {len(trained)} models", unit="model")
    table = pd.concat(parts, ignore_index=True)
    with whole_file(run_dir / "drift.csv") as temporary:
        table.to_csv(temporary, index=False)
    return table


def trained_cells(run_dir: Path) -> list[Cell]:
    """The finished cells of a run folder, starts included, in order."""
    found = [read_json(path) for path in (run_dir / "models").glob("*/*/seed-*/cell.json")]
    if not found:
        raise FileNotFoundError(f"no finished model in {run_dir}: run notebook 02 first")
    return sorted(Cell(facts["task"], facts["method"], facts["seed"]) for facts in found)
