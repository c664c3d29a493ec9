"""Everything outside that is not a disk: the streams of profile, and Prometheus.

stream.py    a server stream that is opened again whenever it ends
profiles.py  live histories: the stream, and a call on a miss
catalog.py   the catalogue: the stream, in columns
experiments.py  the experiments that run, asked of feedback
metrics.py   what Prometheus is told
"""
