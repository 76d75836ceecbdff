"""Without PyTorch there is nothing to compare with: every file here is skipped, and the summary says why."""

import importlib.util

import pytest


class WithoutTorch(pytest.Module):
    """A test file that is not even imported."""

    def collect(self):
        pytest.skip("compares with PyTorch, which is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    if importlib.util.find_spec("torch") is None:
        return WithoutTorch.from_parent(parent, path=module_path)
    return None
