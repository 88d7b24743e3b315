"""Speed: what is measured, against whom, on which machine. Results are data files under ``results/``."""
