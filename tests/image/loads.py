"""Run in the full image: import what an engine imports and load every compiled part of vLLM, a line for each.

libcuda comes with a driver: a stand-in takes its place, whose functions say that there is no GPU.
"""

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module, metadata
from pathlib import Path

MODULES = ("torch", "triton", "flashinfer", "xgrammar", "ray", "vllm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.gpu_worker")
parts = sorted(file for file in metadata.files("vllm") or () if file.name.endswith(".so"))

if "LD_LIBRARY_PATH" not in os.environ:  # which the loader reads when a process starts
    command = ["nm", "-D", "--undefined-only", *(part.locate() for part in parts)]
    names = sorted(set(re.findall(r"\bU (cu[A-Z]\w*)", subprocess.run(command, capture_output=True, text=True).stdout)))
    print("of libcuda they name:", *names, flush=True)
    folder = Path(tempfile.mkdtemp())
    (folder / "made.c").write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in names))  # no device
    made = ["-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1", folder / "made.c"]
    subprocess.run(["gcc", "-shared", "-fPIC", *made], check=True)
    os.execve(sys.executable, sys.orig_argv, os.environ | {"LD_LIBRARY_PATH": str(folder)})

for name in MODULES:
    module = import_module(name)
    print("imported", name, getattr(module, "__version__", ""))
known = sys.modules["torch"]._C._dispatch_get_all_op_names
before = set(known())
for part in parts:
    path = Path(part.locate())
    ctypes.CDLL(str(path))  # every symbol is looked for now
    print(f"loaded {path.stat().st_size / 1e6:7.1f} MB  {part}")
print("operators they registered:", len(set(known()) - before))
