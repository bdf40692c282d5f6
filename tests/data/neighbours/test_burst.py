"""pytest test_burst.py --kv-burst-sizes=1,4"""

import pytest


@pytest.mark.kv_suite("burst")
def test_burst(kv_case, kv_run):
    kv_run(kv_case)
