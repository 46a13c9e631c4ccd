"""`sluice doctor` and `sluice report`: what a node shows of itself, judged; and the same packed for somebody else."""
