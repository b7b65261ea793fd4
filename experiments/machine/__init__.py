"""What is at hand.

In: this machine, its memory, disk and GPUs. Out: the testbeds that it can run, why not the others, and whether a model
fits a GPU.
"""
