"""What the server of processes imports once, for all that it forks."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""


import spattn_olmoe.evaluation
import spattn_olmoe.olmo.config
import spattn_olmoe.olmo.experiment
import spattn_olmoe.olmo.report
import spattn_olmoe.olmo.resilience  # noqa: F401
