"""One run in a process of its own: `python -m services.trainer.run --run-id ID --attempt N`.

Started by the supervisor. The composition root of a run, as the server's `__main__` is that of the server: it wires
the log, the catalogue, the pipeline and the registry, and says in the database how the run ends.
"""
