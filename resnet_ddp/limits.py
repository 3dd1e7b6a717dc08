"""What an option may be, and so what a recorded setting may have been."""

PRECISIONS = ("bf16", "fp32")
DATA_PATHS = ("resident", "ffcv")
MAX_THREADS = 1024  # beyond that a machine runs out of them instead of running faster
MAX_INTEGER = 2**32 - 1  # any other count or seed
