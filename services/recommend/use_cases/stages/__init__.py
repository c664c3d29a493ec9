"""The pipeline's stages, each a module that reads what those before it found in a `Ranking` and adds its own.

history.py  what the shopper did, and does right now
judge.py    what may not be shown
score.py    what each item is worth
second.py   the best of them once more, by what the shopper is expected to do with them
choose.py   the page: tiers, diversity, rules, exploration
explain.py  the reasons of the page
answer.py   the answer, its token, and what it went without
"""
