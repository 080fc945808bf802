"""CARMA: mutual-information and stability losses for fine-tuning causal language models.

`CarmaTrainer` is `transformers.Trainer` with the two terms, `CarmaSFTTrainer` TRL's `SFTTrainer`, and
`CarmaMixin` puts them on any other trainer; `CarmaLoss` is for your own loop; `encode`, `encode_text` and `Collator` make rows;
`constituent_aware_pooling` and `replace_synonyms` are the two interventions. Source: arXiv 2502.11066.
"""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from carma_lib.collate import Collator, encode, encode_text
    from carma_lib.losses import CarmaConfig, CarmaLoss, mutual_information_loss, stability_loss
    from carma_lib.synonyms.replacement import replace_synonyms
    from carma_lib.pooling import constituent_aware_pooling, pooling_grid
    from carma_lib.trainer import CarmaMixin, CarmaSFTTrainer, CarmaTrainer

__version__ = "0.1.0"
_HOMES = {
    "CarmaConfig": "losses", "CarmaLoss": "losses", "mutual_information_loss": "losses", "stability_loss": "losses",
    "CarmaMixin": "trainer", "CarmaSFTTrainer": "trainer", "CarmaTrainer": "trainer",
    "Collator": "collate", "encode": "collate", "encode_text": "collate",
    "constituent_aware_pooling": "pooling", "pooling_grid": "pooling",
    "replace_synonyms": "synonyms.replacement",
}
__all__ = sorted(set(_HOMES) - {"CarmaSFTTrainer"})  # which needs TRL


def __getattr__(name: str):
    """Load a public name from its module on first use, so that `import carma_lib` takes no seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'carma_lib' has no attribute '{name}'")
    return getattr(importlib.import_module(f"carma_lib.{_HOMES[name]}"), name)
