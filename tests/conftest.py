import os

# One thread per process: two cores are shared by all that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
