"""What every test shares: hypothesis profiles, the development data, and one thread budget."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parents[1]

# No deadline anywhere: the first torch call of a process is slow, and a busy machine is not a bug.
# `too_slow` measures how long inputs take to draw, and here the inputs are whole models.
settings.register_profile(
    "default", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
# The same examples on every run, for `make test` and for continuous integration.
settings.register_profile(
    "ci",
    settings.get_profile("default"),
    max_examples=20,
    derandomize=True,
    database=None,
    print_blob=True,
)
# For a long look after a change to the mathematics: pytest --hypothesis-profile=thorough
settings.register_profile("thorough", settings.get_profile("default"), max_examples=500)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that asks for `shared_data` as `real`, so that the marker cannot be forgotten.

    Slow tests come first: at the end, one that is left over would keep one worker busy and the others idle.
    """
    for item in items:
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.real)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let the search for garbage pass over what stays: the modules of torch, timm and transformers, and all
    tests, a million objects. Looking through them again and again took a twentieth of the time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def fair_share_of_threads() -> Iterator[None]:
    """Give each pytest-xdist worker its part of the cores; leave torch alone when there is one process."""
    before = torch.get_num_threads()
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, min(before, (os.cpu_count() or 1) // workers)))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real weights and photographs, which the repository does not contain.

    It is named by the environment variable `CIRCUITVIT_SHARED`, else it is `shared/data` beside the checkout.
    """
    named = os.environ.get("CIRCUITVIT_SHARED")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        origin = "named by CIRCUITVIT_SHARED" if named else "used when CIRCUITVIT_SHARED is not set"
        pytest.skip(f"no development data: the folder {folder}, {origin}, does not exist")
    return folder
