import os

from hypothesis import settings

# One thread per process: two cores are shared by all that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test is a matter of time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
