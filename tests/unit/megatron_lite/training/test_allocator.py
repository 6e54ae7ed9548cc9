"""What is freed is there for the next step, or gone, as it was asked for."""

import platform
import sys

import pytest

from tests.kit.jobs import run_job

COUNT = """
import resource, sys, torch
from megatron_lite.training import allocator


def step():
    kept = [torch.ones(1 << 22) for _ in range(8)]  # 16 MiB each


exec(sys.argv[1])
step()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told what to do")
@pytest.mark.parametrize("action, kept", [("allocator.keep_freed()", True), ("allocator.return_freed(1 << 20)", False)])
def test_pages_of_a_tensor_that_is_made_again(action, kept):
    pages = 8 * (16 << 20) // 4096
    faults = int(run_job([sys.executable, "-c", COUNT, action], timeout=60).expect(exit_code=0).stdout)
    if kept:
        assert faults < pages // 4
    else:
        assert faults >= pages // 2
