"""Settings of the process that runs the tests; they must stand before torch is imported."""

import os

# Every xdist worker has one thread, so that workers do not fight for cores and every sum has one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network fails at once
