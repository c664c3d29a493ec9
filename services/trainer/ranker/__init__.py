"""The second stage: from logged impressions to a ranker that deserves to be served, or to the reason why there is none.

responses.py   what was shown and what came of it, from the log into arrays
items.py       the table of items that features need
first_stage.py a published version's scores, as serving would have made them then
examples.py    responses + first stage -> features and labels, split by time
network.py     the cross network in TensorFlow, with a tower for the position
measuring.py   AUC, log-loss, calibration, and the value of an order under a click model
build.py       all of it: trains, calibrates, judges
card.py        what the model card says of it

N = impressions, P = pages, E = events, I = items, F = features, T = tasks, U = people.
"""
