"""The real engine.

In: a session and the trials that it owes. Out: a record of each, step by step, from vLLM stepped by hand in a process
of its own. Only `vllm_engine.py` imports vllm and torch.
"""
