"""The README's figure, from the claims of the study on pretrained models: `python book/finding.py` draws it again.

`pictures/finding.csv` holds the claims as notebook 12 writes them (`tables/pretrained_claims.csv`).
"""
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from carma_lib.report.plots import forest_plot

PICTURES = Path(__file__).resolve().parent / "pictures"


def finding() -> Figure:
    """CARMA minus plain fine-tuning from SmolLM2 in each claim, both tasks; the ratios of spreads in a panel below."""
    return forest_plot(pd.read_csv(PICTURES / "finding.csv"))


if __name__ == "__main__":
    finding().savefig(PICTURES / "finding.png", dpi=160, metadata={"Software": None})
