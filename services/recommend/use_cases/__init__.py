"""What the service does, in terms of its domain and its ports.

world.py        one model and one catalogue, joined: what a request is answered from
histories.py    a shopper's events, as fresh as asked for, within the deadline
scoring.py      scores over the whole catalogue, by kind of question
eligibility.py  what may not be shown
selection.py    from scores to a page
reasons.py      why, true of the score
ranking.py      one request on its way
stages/         the pipeline, stage by stage
recommender.py  the stages in their order
explainer.py    why, and why not
"""
