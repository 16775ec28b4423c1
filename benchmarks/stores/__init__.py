"""What the ``store`` routine compares.

drive.py: how chunks are put and got, the same code for every system. engines.py: kvoffload, vLLM's
fs tier. raw.py, raw.cpp: the disk itself through io_uring. peer_lmcache.py: LMCache, in its venv.
"""
