"""What became of every connection of enrolled pods: collected in the kernel, told as records and as totals."""
