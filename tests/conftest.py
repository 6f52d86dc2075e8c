"""What all tests share: the seed, one thread, Hypothesis' settings, and the devices they run on."""

import signal

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "igm",
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
# For `pytest --hypothesis-profile=long`: other examples each time; a failure says how to repeat it.
hypothesis.settings.register_profile(
    "long",
    max_examples=2000,
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("igm")

NO_CUDA = "needs a CUDA device, and torch sees none"


def pytest_runtest_setup(item):
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip(NO_CUDA)


def pytest_terminal_summary(terminalreporter):
    """Say aloud how many cases were not run for want of a GPU."""
    skipped = sum(NO_CUDA in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.write_line(f"{skipped} CUDA cases were NOT run: torch sees no CUDA device", yellow=True)


@pytest.fixture(autouse=True)
def _reproducible():
    """Start every test from the same seed, on one thread (two give other sums), with Ctrl-C as Python has it.

    A process that a shell runs in the background ignores Ctrl-C.
    """
    threads = torch.get_num_threads()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Run a test on each device."""
    return torch.device(request.param)
