"""The README's figure, from the primary tests of the controlled study: `python book/finding.py` draws it again.

`pictures/finding.csv` holds the tests from a base model as notebook 8 writes them (`tables/study_primary_base.csv`).
"""
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from carma_lib.report.plots import forest_plot

PICTURES = Path(__file__).resolve().parent / "pictures"
#: The three questions that the README answers first. Notebook 8 shows all of them.
QUESTIONS = ("new combinations", "synonyms", "performance preserved")


def finding() -> Figure:
    """CARMA minus plain fine-tuning in the questions of the README, both tasks, one question below the other."""
    tests = pd.read_csv(PICTURES / "finding.csv")
    asked = [tests[tests["name"].str.contains(f": {question}")] for question in QUESTIONS]
    return forest_plot(pd.concat(asked, ignore_index=True))


if __name__ == "__main__":
    finding().savefig(PICTURES / "finding.png", dpi=160, metadata={"Software": None})
