"""The recommend service: what shall I show this person, here, now?"""

import os

# Requests are the parallelism here. BLAS threads within one would wait for each other's cores: a product
# of 0.1 ms took 18 ms on a busy machine. Read when NumPy is first imported, hence here.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
