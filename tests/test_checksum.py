"""Checksums of data in parts, against zlib's of the whole."""

from __future__ import annotations

import itertools
import random
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

from megatron_converters.storage import checksum


def test_threads_combine_checksums_at_once() -> None:
    """The matrices are made at the first use; threads that made them at the same time once left wrong ones behind."""
    data = random.Random(0).randbytes(3_000_001)
    sizes = [1, 2, 3, 4095, 65_537, 1_000_000]
    cuts = [0, *itertools.accumulate(sizes), len(data)]
    parts = [(zlib.crc32(data[start:stop]), stop - start) for start, stop in itertools.pairwise(cuts)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            checksum._zero_bytes.cache_clear()
            with ThreadPoolExecutor(8) as pool:
                assert set(pool.map(lambda _: checksum.combined(parts), range(16))) == {zlib.crc32(data)}
    finally:
        sys.setswitchinterval(interval)
