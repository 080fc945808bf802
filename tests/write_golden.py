"""Write `golden/small_cells.json`, what `test_lab_train.py` holds small trainings to. Run it only for a change that is meant."""
import json
import statistics
import tempfile
from pathlib import Path

from distributed import Client

from carma_lib.lab.run import run
from test_lab_train import GOLDEN, GOLDEN_CELLS, answers

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, Client(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as client:
        failed = run(GOLDEN_CELLS.values(), Path(folder), client)
        assert not failed, failed
        content = {}
        for method, cell in GOLDEN_CELLS.items():
            table = answers(Path(folder), cell)
            content[method] = {"key": cell.key, "condition": table.condition.astype(str).tolist(),
                               "item_id": table.item_id.astype(str).tolist(), "changed": table.changed.tolist(),
                               "log_probability": [round(float(value), 2) for value in table.log_probability],
                               "rank": table["rank"].tolist(), "prediction": table.prediction.astype(str).tolist()}
        for method in content.keys() - {"fine_tuning"}:  # else the tolerance of 0.02 could not tell whether a method is at work
            apart = [abs(one - other) for one, other in zip(content[method]["log_probability"], content["fine_tuning"]["log_probability"])]
            assert statistics.median(apart) > 0.2, (method, apart)
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
