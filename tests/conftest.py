"""What all tests share: poisoned memory, a fixed seed, a run per instruction set, hypothesis' profile."""

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from sparseops import _native, env

# no example database and no clock: every run tries the same examples
hypothesis.settings.register_profile("sparseops", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("sparseops")

ISAS = [isa for isa in env.CPU_ISAS if _native.C is not None and _native.C.cpu_supports(isa)]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN, so that an element that no kernel wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=ISAS or ["missing"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that was built and that this processor has, in use while the test runs."""
    module = _native.require("tests")
    before = module.cpu_isa()
    module.cpu_use_isa(request.param)
    yield request.param
    module.cpu_use_isa(before)
