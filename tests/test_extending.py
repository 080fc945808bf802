"""The book's page on adding a model, a task and a method, done to a copy of the package exactly as it is written."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TRY = '''
from pathlib import Path
import torch
from carma_lib.report import plots as figures
from carma_lib.lab.cell import Cell
from carma_lib.lab.recipe import recipe_for
from carma_lib.lab.run import run
from carma_lib.lab.tables import pack
from carma_lib.models.table import prompt_for, settings_for
from carma_lib.pooling import pooling_grid
from carma_lib.stats.table import read_results
from carma_lib.stats.metrics import per_seed, summarise
from carma_lib.tasks import build_task
from distributed import Client
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)
folder = Path("run")
rows = build_task("sums", folder / "data" / "sums")
assert {name: len(split) for name, split in rows.items()} == {"train": 70, "validation": 10, "test": 20}
assert prompt_for("sums").suffix == ' is "'
recipe = recipe_for("sums", dict(steps={"sums": 30}, learning_rate=0.01, layers=2, width=16, heads=2, vocabulary_size=265, batch_size=8,
                                 warmup_steps=1, evaluations=1, rates=(), depth_shares=(1.0,), protocols=("mean",),
                                 levels=("word",), measures=()), seeds=(1,)).recipe
cells = [Cell("sums", method, 1, recipe) for method in ("untuned", "fine_tuning", "confidence_penalty")]
with Client(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None, set_as_default=False) as client:
    assert not run(cells, folder, client, collect=lambda: pack(folder, cells, folder))
results = read_results(folder / "results.parquet")
unchanged = results[results.condition == "clean"]
answers = unchanged.pivot_table(index="item_id", columns="method", values="log_probability", observed=True)
assert len(answers) == 20, len(answers)
assert (answers.confidence_penalty != answers.fine_tuning).any()
figure = figures.accuracy_by_method(summarise(unchanged, "accuracy"), per_seed(unchanged, "accuracy"))
figures.save_figure(figure, folder, "figure", unchanged)

chosen = settings_for("your-name/granite-small", "sums", num_layers=4)
assert (chosen.carma_weight, chosen.epochs) == (0.1, 5) and "epochs" in chosen.published
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
    "granite", vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=2)).eval()
ids, mask = torch.arange(5, 11)[None], torch.ones(1, 6, dtype=torch.int64)
grid = pooling_grid(model, ids, mask, torch.full((1, 6), -1), start_layers=[0, 3], protocols=["mean"])
assert all((logits - grid.clean).abs().max() < 1e-5 for logits in grid.pooled.values()), "nothing is pooled"
words = pooling_grid(model, ids, mask, torch.tensor([[0, 0, 1, 1, 2, -1]]), start_layers=[0, 3], protocols=["mean"])
assert words.changed.tolist() == [2]
assert all((logits - grid.clean).abs().max() > 1e-5 for logits in words.pooled.values())
print("all of it works")
'''


def blocks():
    page = (ROOT / "book" / "extending.md").read_text(encoding="utf-8")
    return [block.split("\n", 1) for block in re.findall(r"```(?:python|yaml)\n(.*?)```", page, re.DOTALL)]


def apply(root, heading, text):
    """One block of the page: a new file, lines after the one line that begins so, or lines at the end of a file."""
    if found := re.fullmatch(r"# new file: (\S+)", heading):
        (root / found[1]).write_text(text, encoding="utf-8")
    elif found := re.fullmatch(r"# at the end of (\S+)", heading):
        with open(root / found[1], "a", encoding="utf-8") as file:
            file.write("\n\n" + text)
    else:
        found = re.fullmatch(r"# in (\S+), after the line: (.+)", heading)
        assert found, heading
        lines = (root / found[1]).read_text(encoding="utf-8").split("\n")
        places = [place for place, line in enumerate(lines) if line.startswith(found[2])]
        assert len(places) == 1, f"{found[1]} has {len(places)} lines that begin with {found[2]!r}"
        lines[places[0] + 1:places[0] + 1] = text.rstrip("\n").split("\n")
        (root / found[1]).write_text("\n".join(lines), encoding="utf-8")


def test_the_page_holds(tmp_path):
    shutil.copytree(ROOT / "carma_lib", tmp_path / "carma_lib", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "lexicon.yml", tmp_path / "data")
    found = blocks()
    assert len(found) >= 9
    for heading, text in found:
        apply(tmp_path, heading, text)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", TRY], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=300)
    assert done.stdout.strip().endswith("all of it works"), done.stderr[-2000:]
