"""One thread for all tests and the processes they start: models are tiny, and barriers cost more than they compute."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
