"""Bad inputs by the five doors, each of which must give one clear line: command line, manifest, sweep file, data file,
Python interface. `attack.py` tells how many do, `tests/test_runs.py` holds them to it.
"""
from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from carma_lib import CarmaConfig, CarmaLoss, constituent_aware_pooling, mutual_information_loss, replace_synonyms, stability_loss
from carma_lib.__main__ import main
from carma_lib.collate import encode, encode_text
from carma_lib.files import RunError
from carma_lib.lab.cell import Cell, read_plan
from carma_lib.lab.plan import read_sweep
from carma_lib.lab.recipe import Recipe, recipe_for
from carma_lib.lab.study import read_study
from carma_lib.manifest import make_plan
from carma_lib.models import load_config, load_model, load_tokenizer, small_model, train_tokenizer
from carma_lib.pooling import start_layers_from_depth
from carma_lib.stats.metrics import summarise
from carma_lib.stats.table import read_results
from carma_lib.tasks import build_task, load_task

Case = tuple[str, Callable[[], Any]]
NOTEBOOKS = ("01_data_construction", "02_finetune", "03_evaluate", "04_statistics")


def fault(call: Callable[[], Any]) -> str:
    """What is wrong with the answer to a bad input; empty if it is one clear line and no traceback.

    A call either ends with an exit code and one line on standard error (the command line), or raises a `ValueError`,
    `TypeError`, `OSError` or `RunError` of one line.
    """
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = call()
    except SystemExit as stop:  # argparse prints how to call it first
        line = told.getvalue().strip().splitlines()[-1:]
        return "" if stop.code == 2 and line and ": error: " in line[0] else f"exit {stop.code}"
    except (ValueError, TypeError, OSError, RunError) as error:
        text = str(error)
        return "" if text.strip() and "\n" not in text and len(text) < 700 else f"no line, or several: {text[:200]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    lines = [line for line in told.getvalue().strip().splitlines() if line.strip()]
    if type(code) is not int:
        return "accepted"
    if code != 1:
        return f"exit code {code}"
    return "" if len(lines) == 1 and lines[0].startswith("carma_lib: ") else f"{len(lines)} lines: {' | '.join(lines)[:200]}"


def command_line(work: Path) -> Iterator[Case]:
    """`python -m carma_lib run --dry-run` with one wrong setting, and other wrong calls."""
    settings = [
        '02_finetune.methods=["carmen"]', "02_finetune.batch_size=0", "02_finetune.carma_weight=3.0", "02_finetune.mi_layers=[0,9]",
        "03_evaluate.rates=[25]", '03_evaluate.levels=["clause"]', '01_data_construction.tasks=["sst4"]', "02_finetune.start=/no/such",
        "02_finetune.seeds=[1, 1]", '03_evaluate.levels=["word", "word"]', '02_finetune.steps={{"sentiment": 10}}', "seeds=[4294967296]",
        "seeds=[-1]", "seeds=[1.5]", "seeds=[True]", "seeds=[[1]]", 'methods=["fine_tuning"]', "methods=[]", "tasks=[]", "tasks=[1]",
        'tasks=["gone.csv"]', 'tasks=["sst3", "data/gone.jsonl"]', 'tasks=["gone.csv", "gone.csv"]',
        """07_controlled_study.changes={'settings': {'plain_texts': ['sst9']}}""", """changes={'settings': {'stepps': 3}}""",
        """11_pretrained_study.changes={'blocks': {'primary': {'seeds': [-1]}}}""",
        """11_pretrained_study.changes={'settings': {'rates': [25]}}""", "learning_rate=float('nan')", "learning_rate=1e999", "learning_rate=-1", "warmup_steps=1000",
        "temperature=1e-30", "margin=1.5", "baseline=nobody", '04_statistics.methods=["r_drop"]',
        "workers=0", "workers=-2", '03_evaluate.recipe={"test_splits": ["train"]}', '03_evaluate.recipe={"test_splits": ["test_no"]}',
        '03_evaluate.recipe={"steps": 3}', '02_finetune.recipe={"layres": 3}', 'family="bert"', "width=30", "precision=fp8",
        "adapter=qlora", "split_by=column", '07_controlled_study.blocks=["nowhere"]', 'changes={"margins": 1}', "plan=no/plan.yml",
        "depth_shares=[0.5, 1.5]", "test_items=-1", "vocabulary_size=10", 'protocols=["median"]',
        '06_what_the_interventions_do.seed=-3', '05_how_carma_works.layers=0',
        "05_how_carma_works.batch_size=0", "start=random:/no/such", '01_data_construction.start="/no/such"', "fail=1", "steps", "run_dir=x", "=", "run=", "02_finetune.=3",
        "rates=[]", "baseline=carma", "04_statistics.methods=['fine_tuning']", "02_finetune.methods=['untuned','fine_tuning','carma']",
        "levels=['phrase']", "batch_size=0", "layers=10000000", "rates=[0.25,0.250001]", "12_pretrained_answers.changes={'claims': []}",
        "08_study_results.changes={'claims': [{'name': 'x'}]}", "width=12",
    ]
    for setting in settings:
        yield f"--set {setting}", partial(main, ["run", "--profile", "ci", "--dry-run", "--run-dir", str(work / "new"), "--set", setting])
    file, thesis, damaged = work / "file", work / "thesis", work / "damaged"
    file.write_text("")
    for folder, name, text in ((thesis, "chapter.txt", "years"), (damaged, "status.json", ""), (damaged, "chapter.txt", "years")):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name, folder in (("a file", file), ("in a file", file / "run"), ("foreign files", thesis), ("damaged and foreign", damaged),
                         ("nobody's home", "~no_such_user/run"), ("a zero byte", "run\0s")):
        yield f"--run-dir: {name}", partial(main, ["run", "--profile", "ci", "--dry-run", "--fresh", "--run-dir", str(folder)])
    for words in (["run", "--profile", "nowhere"], ["run", "--resume", "--fresh"], ["walk"], [], ["sweep"], ["sweep", str(work / "gone.yml")],
                  ["sweep", str(work)], ["sweep", "sweeps/example.yml", "--dry-run", "--workers", "0"],
                  ["sweep", "sweeps/example.yml", "--dry-run", "--workers", "two"], ["sweep", "sweeps/example.yml", "--dry-run", "--scheduler", ""],
                  ["sweep", "sweeps/example.yml", "--retries", "-1"], ["sweep", "sweeps/example.yml", "--dry-run", "--retries", "-1"],
                  ["sweep", "sweeps/example.yml", "--dry-run", "--slurm", str(work / "gone.yml")], ["publish", "now"]):
        yield " ".join(words) or "no command", partial(main, words)


def manifest(work: Path) -> Iterator[Case]:
    """A project of the real notebooks whose `nbs_ci.yml` is damaged."""
    root = Path(__file__).resolve().parent.parent
    whole = yaml.safe_load((root / "nbs_ci.yml").read_text(encoding="utf-8"))
    first = whole["notebooks"][0]
    changes: dict[str, Any] = {
        "no notebooks": {"profiles": {"ci": {}}}, "a list": [], "nothing": None, "profiles are a list": {**whole, "profiles": ["ci"]},
        "a profile is a list": {**whole, "profiles": {"ci": ["01_data_construction"]}},
        "unknown notebook": {**whole, "profiles": {"ci": {"11_more": {}}}},
        "unknown parameter": {**whole, "profiles": {"ci": {"02_finetune": {"stepps": 3}}}},
        "seconds in words": {**whole, "notebooks": [{**first, "cell_seconds": "ten"}]},
        "a notebook that is not there": {**whole, "notebooks": [{**first, "name": "99_lost"}]},
        "needs absent": {**whole, "notebooks": [{name: value for name, value in first.items() if name != "needs"}]},
        "a date for seeds": {**whole, "profiles": {"ci": {"02_finetune": {"seeds": "2026-01-01"}}}},
    }
    texts = {name: yaml.safe_dump(value) for name, value in changes.items()} | {
        "not YAML": "a: [", "python object": "notebooks: !!python/object/apply:os.system ['true']", "tabs": "notebooks:\n\t- a"}
    for name, text in texts.items():
        folder = work / f"manifest-{name.replace(' ', '-').replace('/', '-')}"
        folder.mkdir(exist_ok=True)
        (folder / "nbs_ci.yml").write_text(text, encoding="utf-8")
        if not (folder / "notebooks").exists():
            (folder / "notebooks").symlink_to(root / "notebooks")
        yield name, partial(make_plan, "ci", root=folder)


def sweep_file(work: Path) -> Iterator[Case]:
    """A sweep file with one wrong entry."""
    right = {"run_dir": str(work / "sweep"), "tasks": ["controlled_sentiment"], "models": ["random"], "methods": ["fine_tuning", "carma"],
             "seeds": [1, 2], "settings": {"steps": 10, "warmup_steps": 0}}
    semicolons = work / "semicolons.csv"
    semicolons.write_text("text;target\na;b\n", encoding="utf-8")
    changes = {
        "unknown key": {"sedes": [1]}, "no tasks": {"tasks": []}, "tasks in words": {"tasks": "sst3"}, "unknown task": {"tasks": ["sst4"]},
        "a seed twice": {"seeds": [1, 1]}, "seed in words": {"seeds": ["one"]}, "seed of 2**32": {"seeds": [2**32]},
        "seed below 0": {"seeds": [-1]}, "true for a seed": {"seeds": [True]}, "unknown method": {"methods": ["carmen"]},
        "method twice": {"methods": ["carma", "carma"]}, "the same model twice": {"models": ["random", {"start": "random"}]},
        "unknown family": {"settings": {"family": "bert"}}, "absent model": {"models": ["/no/such"]}, "model is a number": {"models": [3]},
        "model without start": {"models": [{"width": 32}]}, "run_dir is a number": {"run_dir": 3}, "run_dir is empty": {"run_dir": " "},
        "learning rate nan": {"settings": {"learning_rate": float("nan")}}, "learning rate infinite": {"settings": {"learning_rate": float("inf")}},
        "warm-up longer than training": {"settings": {"steps": 10, "warmup_steps": 11}}, "temperature 1e-30": {"settings": {"temperature": 1e-30}},
        "trained splits tested": {"conditions": {"test_splits": ["train"]}}, "unknown split": {"conditions": {"test_splits": ["test_no"]}},
        "a setting among conditions": {"conditions": {"steps": 3}}, "rate of 25": {"conditions": {"rates": [25]}},
        "data of another task": {"data": {"sst3": {}}}, "split_by unknown": {"tasks": ["wordnet_inverse_dictionary"], "data": {
            "wordnet_inverse_dictionary": {"split_by": "column"}}}, "steps in words": {"settings": {"steps": "many"}},
        "test_at after the end": {"settings": {"steps": 10, "warmup_steps": 0, "test_at": [20]}}, "settings is a list": {"settings": [1]},
        "settings is an empty list": {"settings": []}, **{f"no {key} after its name": {key: None} for key in ("run_dir", "tasks", "models", "methods", "seeds")}, "conditions are false": {"conditions": False}, "data is 0": {"data": 0},
        "no such file": {"tasks": ["gone.csv"]}, "a damaged file": {"tasks": [str(semicolons)]}, "a zero byte in run_dir": {"run_dir": "run\0s"}, "tokenizer of a file": {"settings": {"steps": 10, "warmup_steps": 0, "tokenizer_tasks": ["my.csv"]}},
        "plain texts of a file": {"conditions": {"plain_texts": ["nofile.csv"]}},
        "layers of no block": {"settings": {"steps": 10, "warmup_steps": 0, "mi_layers": [0, 9]}}, "steps and epochs": {"settings": {"steps": 1, "epochs": 1}},
    }
    texts = {name: yaml.safe_dump({**right, **change}) for name, change in changes.items()} | {
        "empty": "", "not YAML": "a: [", "a list": "[1]", "python object": "run_dir: !!python/object/apply:os.system ['true']", "zero bytes": "\0\0"}
    for number, (name, text) in enumerate(texts.items()):
        file = work / f"sweep-{number}.yml"
        file.write_text(text, encoding="utf-8")
        yield name, partial(read_sweep, file)
    binary = work / "binary.yml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    yield "binary", partial(read_sweep, binary)


def data_file(work: Path) -> Iterator[Case]:
    """One's own data with one fault each, damaged result tables and damaged built data."""
    rows = "".join(f"text {number},answer {number % 3}\n" for number in range(12))
    texts = {
        "empty.csv": "", "header.csv": "text,target\n", "few.csv": "text,target\na,b\n", "no_target.csv": "text,label\na,b\n",
        "semicolons.csv": "text;target\na;b\n", "ragged.csv": "text,target\na,b,c\n", "quote.csv": 'text,target\n"a,b\n', "one_answer.csv":
        "text,target\n" + "".join(f"text {number},same\n" for number in range(12)), "no_text.csv": f"text,target\n{rows} ,b\n",
        "contrary.csv": f"text,target\n{rows}text 0,other\n", "split.csv": "text,target,split\n" + "".join(
            f"text {number},answer {number % 3},holdout\n" for number in range(12)), "number.jsonl": '{"text": "a", "target": 3}\n' * 12,
        "list.jsonl": "[1]\n", "cut.jsonl": '{"text": "a", "tar', "phrases.jsonl": '{"text": "abc", "target": "b", "phrases": [[2, 9]]}\n',
        "null.jsonl": '{"text": null, "target": "b"}\n', "surrogate.jsonl": '{"text": "\\ud800", "target": "b"}\n', "zero.tsv": "text\ttarget\n\0\n",
        "twice.csv": "text,target,text\na,b,c\n", "text.parquet": "no parquet"}
    for name, text in texts.items():
        (work / name).write_text(text, encoding="utf-8")
        yield name, partial(build_task, str(work / name), work / f"{name}-built")
    (work / "latin.csv").write_bytes("text,target\ncafé,b\n".encode("latin-1"))
    yield "latin.csv", partial(build_task, str(work / "latin.csv"), work / "latin-built")
    yield "gone.csv", partial(build_task, str(work / "gone.csv"), work / "gone-built")
    yield "data.docx", partial(build_task, str(work / "data.docx"), work / "docx-built")
    pd.DataFrame({"text": [1, 2], "target": ["a", "b"]}).to_parquet(work / "numbers.parquet")
    yield "numbers.parquet", partial(build_task, str(work / "numbers.parquet"), work / "numbers-built")
    for name, table in (("columns", pd.DataFrame({"a": [1]})), ("no rows", pd.DataFrame({"a": []}))):
        table.to_parquet(work / f"{name}.parquet")
        yield f"results: {name}", partial(read_results, work / f"{name}.parquet")
    whole = (work / "columns.parquet").read_bytes()
    for name, content in (("cut", whole[:40]), ("zero", b""), ("text", b"results")):
        (work / f"{name}.parquet").write_bytes(content)
        yield f"results: {name}", partial(read_results, work / f"{name}.parquet")
    yield "results: absent", partial(read_results, work / "gone.parquet")
    yield "data: absent", partial(load_task, work / "gone")
    built = work / "built"
    build_task("controlled_sentiment", built)
    arrow = next(built.rglob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:-100])
    yield "data: cut Arrow file", partial(load_task, built)
    for name, content in (("card of no bytes", ""), ("card is a list", "[]"), ("card without counts", "{}")):
        folder = work / name
        folder.mkdir(exist_ok=True)
        (folder / "card.json").write_text(content)
        yield f"data: {name}", partial(load_task, folder)
    for name, content in (("cut", '[{"task"'), ("an object", "{}"), ("of other facts", '[{"a": 1}]')):
        (work / f"plan {name}" / "cells").mkdir(parents=True, exist_ok=True)
        (work / f"plan {name}" / "cells" / "plan.json").write_text(content)
        yield f"cells/plan.json {name}", partial(read_plan, work / f"plan {name}")


def python_interface(work: Path) -> Iterator[Case]:
    """Wrong arguments of public functions and classes."""
    tokenizer = train_tokenizer(["the cat sat on the mat"], vocabulary_size=300)
    model = small_model("llama", tokenizer, layers=2, width=16, heads=2)
    from datasets import Dataset

    rows = Dataset.from_dict({"text": ["the cat"], "target": ["a dog ran"]})
    states, ids, mask = torch.randn(2, 1, 4, 8), torch.tensor([[0, 0, 1, -1]]), torch.ones(1, 4, dtype=torch.long)
    tokens = torch.tensor([[1, 2, 3, 4]])
    for name, settings in (("weight above 1", {"carma_weight": 2}), ("weight nan", {"carma_weight": float("nan")}), ("weight in words", {"mi_weight": "much"}),
                           ("layers backwards", {"mi_layers": (3, 1)}), ("layers below 0", {"mi_layers": (-1, 1)}), ("three layers", {"mi_layers": (0, 1, 2)}),
                           ("temperature 1e-30", {"temperature": 1e-30}), ("no negatives", {"num_negatives": 0}), ("similarity", {"similarity": "l2"}),
                           ("one stability layer", {"stability_layers": (1, 1)}), ("a true weight", {"carma_weight": True})):
        yield f"CarmaConfig: {name}", partial(CarmaConfig, **settings)
    yield "CarmaConfig.for_depth(2) of block 5", partial(CarmaConfig(mi_layers=(0, 5)).for_depth, 2)
    yield "CarmaLoss: nan", partial(CarmaLoss(CarmaConfig(mi_layers=(0, 1), stability_layers=(0, 1))), tuple(states * float("nan")) + (states[0],), ids, mask)
    yield "mutual_information_loss: shapes", partial(mutual_information_loss, states, ids[:, :2], mask)
    yield "mutual_information_loss: id −2", partial(mutual_information_loss, states, ids - 2, mask)
    yield "mutual_information_loss: float ids", partial(mutual_information_loss, states, ids.float(), mask)
    yield "mutual_information_loss: whole states", partial(mutual_information_loss, states.long(), ids, mask)
    yield "stability_loss: reduction", partial(stability_loss, states, mask, reduction="most")
    yield "stability_loss: infinite", partial(stability_loss, states * float("inf"), mask)
    for name, call in (("a list", partial(encode, [{"text": "a"}], tokenizer)), ("no target", partial(encode, rows.remove_columns("target"), tokenizer)),
                       ("level", partial(encode, rows, tokenizer, level="clause")), ("answer", partial(encode, rows, tokenizer, answer="word")),
                       ("None", partial(encode, Dataset.from_dict({"text": [None], "target": ["cat"]}), tokenizer)),
                       ("a number", partial(encode, Dataset.from_dict({"text": [3], "target": ["cat"]}), tokenizer)),
                       ("no rows", partial(encode, rows.select([]), tokenizer)), ("many tokens", partial(encode, rows, tokenizer))):
        yield f"encode: {name}", call
    yield "encode_text: blank", partial(encode_text, Dataset.from_dict({"text": [" "]}), tokenizer)
    for name, more in (("rate of 25", {"rate": 25}), ("rate below 0", {"rate": -0.1}), ("rate nan", {"rate": float("nan")}), ("span outside", {"rate": 1, "span": (0, 99)}),
                       ("source", {"rate": 1, "source": "thesaurus"}), ("source of text", {"rate": 1, "source": {"cat": "dog"}})):
        yield f"replace_synonyms: {name}", partial(replace_synonyms, "the cat sat", seed=0, **more)
    yield "replace_synonyms: no text", partial(replace_synonyms, None, rate=0.5, seed=0)
    pooling = partial(constituent_aware_pooling, model, tokens)
    yield "pooling: start layer", partial(pooling, mask, ids, start_layer=9, protocol="mean")
    yield "pooling: protocol", partial(pooling, mask, ids, start_layer=0, protocol="median")
    yield "pooling: apart", partial(pooling, mask, torch.tensor([[0, 1, 0, -1]]), start_layer=0, protocol="mean")
    yield "pooling: no real token", partial(pooling, mask * 0, ids, start_layer=0, protocol="mean")
    yield "pooling: shapes", partial(pooling, mask[:, :2], ids, start_layer=0, protocol="mean")
    yield "pooling: share of depth", partial(start_layers_from_depth, 4, [1.5])
    for name, settings in (("unknown", {"layres": 1}), ("width", {"width": 30}), ("split", {"test_splits": ["validation"]}), ("rates twice", {"rates": [0.1, 0.1]}),
                           ("learning rate", {"learning_rate": float("inf")}), ("steps and epochs", {"steps": 1, "epochs": 1}), ("batch", {"batch_size": 5, "accumulation": 2}),
                           ("qlora of a small one", {"adapter": "qlora"}), ("steps of 1.5", {"steps": 1.5}), ("protocols", {"protocols": ["median"]})):
        yield f"Recipe: {name}", partial(Recipe, **settings)
    recipe = recipe_for("sentiment", {"steps": 10, "warmup_steps": 0}, seeds=(1,)).recipe
    for name, arguments in (("task", ("sst4", "carma", 1)), ("method", ("sst3", "carmen", 1)), ("seed 2**32", ("sst3", "carma", 2**32)),
                            ("seed in words", ("sst3", "carma", "1")), ("strength of none", ("sst3", "fine_tuning", 1, None, 0.5))):
        yield f"Cell: {name}", partial(Cell, *arguments[:3], recipe, *arguments[4:])
    yield "recipe_for: no steps", partial(recipe_for, "sentiment", {}, seeds=(1,))
    yield "recipe_for: no seeds", partial(recipe_for, "sentiment", {"steps": 1, "warmup_steps": 0})
    (work / "study.yml").write_text("tasks: [sst4]")
    yield "read_study", partial(read_study, work / "study.yml")
    yield "summarise: metric", partial(summarise, pd.DataFrame({"a": [1]}), "accurracy")
    for load in (load_config, load_model, load_tokenizer):
        yield f"{load.__name__}: a folder without a model", partial(load, work)
    yield "build_task: split_by", partial(build_task, "wordnet_inverse_dictionary", work / "wordnet", split_by="column")


DOORS = {"command line": command_line, "manifest": manifest, "sweep file": sweep_file, "data file": data_file,
         "Python interface": python_interface}


def faults(door: str, work: Path) -> tuple[int, dict[str, str]]:
    """How many bad inputs were given at a door, and what was wrong with the answer to each that was not one clear line."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    answers = {name: fault(call) for name, call in DOORS[door](work)}
    return len(answers), {name: wrong for name, wrong in answers.items() if wrong}
