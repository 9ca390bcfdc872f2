"""CUDA records one graph at a time in a process, and forbids much to other threads meanwhile."""

import threading

graph_lock = threading.Lock()  # held by who records a CUDA graph
