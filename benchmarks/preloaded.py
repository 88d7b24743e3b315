"""What the server of benchmarks/forked.py imports, once for all processes that it forks: what scripts import when they run."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when those libraries are imported

import spattn_olmoe.cluster.report
import spattn_olmoe.data
import spattn_olmoe.train.config
import spattn_olmoe.train.dry_run
import spattn_olmoe.train.faults
import spattn_olmoe.train.run  # noqa: F401
from spattn_olmoe.collector import keep_everything

keep_everything()  # OLMo-core collects at many points, and would go through all of this in every process
