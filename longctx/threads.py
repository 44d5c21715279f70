"""A pool of threads that run torch with one thread each."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool whose cores are not oversubscribed, and where the order of every sum is fixed.

    torch.set_num_threads reaches MKL and OpenMP in the calling thread alone: a new thread begins with OMP_NUM_THREADS,
    until its first parallel operator. So each thread of the pool sets its own.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # what operators read that start threads of their own
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
