"""What the server of processes imports once, for all that it forks."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import spattn_olmoe.cluster.report
import spattn_olmoe.train.dry_run
import spattn_olmoe.train.faults
import spattn_olmoe.train.run  # noqa: F401
