""" The operators: `naive.py` to be read, `workspace.py` and `memory.py` to be run. """
