"""A user's conftest.py whose policies end their process in every way there is."""

CONFTEST = """
import ctypes
import os
import signal
import time

# loaded before the first case begins, so that a short time limit is about the case
import torch, transformers, datasets
import transformers.models.llama.modeling_llama

from kvsuite.compression import RecentOnly, register_policy


class Hostile(RecentOnly):
    def __init__(self, *, window=3, **common):
        super().__init__(window=window, **common)


def segfault():
    ctypes.string_at(0)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def left():
    os._exit(3)


def sleeper():
    time.sleep(600)


def native():
    # a lock that is taken twice never comes back; PyDLL keeps the interpreter's lock, so that no thread runs either
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def cudaerror():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def hungry():
    raise MemoryError("no more")


for act in (segfault, killed, left, sleeper, native, cudaerror, hungry):
    keep = (lambda act: lambda self, view: act())(act)
    register_policy(type(act.__name__.title(), (Hostile,), {"name": act.__name__, "keep": keep}))


def pytest_collection_finish(session):
    with open(f"visible-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}-{os.getpid()}.txt", "w") as file:
        file.write(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"))
"""
