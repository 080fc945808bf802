"""The laboratory: cells, recipes, plans, training, evaluation, measures, and the one function that runs them."""
