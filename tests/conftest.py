"""Every test runs on eight simulated CPU devices, in full float32, with strict shapes and warnings as errors."""

import gc
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The founders' data folder beside the checkout; tests that want it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the data folder {SHARED}, which is not part of the repository")
    return SHARED


@pytest.fixture
def hub_downloads(monkeypatch):
    """Called with a folder: the Hugging Face hub then has it under every name; returns what it is asked for."""
    hub = pytest.importorskip("huggingface_hub", reason="downloads through huggingface_hub, which is not installed")

    def serve(folder: Path) -> list[tuple[str, list[str]]]:
        asked = []

        def download(repository, allow_patterns):
            asked.append((repository, allow_patterns))
            return str(folder)

        monkeypatch.setattr(hub, "snapshot_download", download)
        return asked

    return serve


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_let_go():
    """Forgets a module's programs when it is done.

    Each holds mapped memory, of which a process gets 65,530 pieces on Linux: after 1,200 tests XLA crashed.
    """
    yield
    jax.clear_caches()
    gc.collect()
