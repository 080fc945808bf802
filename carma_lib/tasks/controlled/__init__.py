"""The controlled lexicon's two tasks: inverse dictionary and sentiment over words made for the purpose."""
from carma_lib.tasks.controlled.lexicon import *  # noqa: F403
