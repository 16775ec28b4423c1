"""Power cuts without hardware: record a store's writes, then replay them with sectors missing.

record.c: an LD_PRELOAD shim that logs what a process does to files below one directory;
record_ring.c: the same for io_uring, at the system call.
load.py: the workload, and the child process that runs it. disk.py: the disk that forgets.
audit.py: what a store serves, against all that was ever put.
"""
