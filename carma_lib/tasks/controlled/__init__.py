"""The controlled lexicon's two tasks: inverse dictionary and sentiment over words made for the purpose."""
