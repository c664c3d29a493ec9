"""The rules of recommending, without transport, storage or model runtime.

Suffixes of array names say their axes: R = rows of the item index (every item
that this process has heard of), I = items of the model, K = items of a page,
N = events of a history, D = dimensions of a vector.
"""
