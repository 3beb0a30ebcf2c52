"""Not the method: skip this folder at first reading. kernels.py: speed; runs.py: files, processes and command lines."""
