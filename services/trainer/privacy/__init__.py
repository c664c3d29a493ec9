"""Differential privacy: unit one person, adjacency add or remove one.

accounting     noise <-> (epsilon, delta), and composition (dp-accounting)
ledger         the append-only ledger in Postgres
contributions  what one person adds, bounded; the catalogue as the set of items
backoff        what serves where the noise is larger than the counts: the catalogue, means over groups
counts         noisy counts of what follows what, and what serves from them
gradients      clipped, noisy gradients of Poisson-sampled people (TensorFlow)
choosing       the one weight that is chosen, by noisy measures on people whom training never read
measuring      noisy measures on people whom training never read
randomness     noise and coins from the operating system's generator
training       a private run, from events to everything that a version is made of
card           the model card of a private version
audit          canaries: what an attacker can prove
"""
