"""The losses of the sources of a mixture: sums over runs of labels, without a loop over the runs."""

import pytest
import torch

from jnana.processing.data import BatchCounts
from jnana.processing.data.counting import SourceCounts
from jnana.training.profiling.sources import SourcesCallback, sums_of_runs


RUNS = [(1, 3), (0, 2), (2, 0), (1, 4), (0, 1)]


def test_sums_of_runs():
    values = torch.arange(10, dtype=torch.float32)
    assert sums_of_runs(values, RUNS, 3).tolist() == [3 + 4 + 9, 0 + 1 + 2 + 5 + 6 + 7 + 8, 0]
    assert sums_of_runs(values[:0], [], 2).tolist() == [0, 0]
    values[9] = torch.nan  # of the first source: the others keep their sums
    assert sums_of_runs(values, RUNS, 3).isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("repeats", [1, 60])
def test_the_number_of_operations_does_not_grow_with_the_runs(repeats):
    runs = RUNS * repeats
    values = torch.rand(10 * repeats)
    callback = SourcesCallback(["a", "b"], lambda numbers: torch.tensor([numbers]))
    sources = (SourceCounts("a", 1, 2, 3), SourceCounts("b", 1, 2, 3))
    counts = BatchCounts(0, (), 10 * repeats, 2, sources=sources, label_sources=tuple(runs))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        callback.add(counts, values)
    assert sum(event.count for event in profile.key_averages()) < 60
    wanted = torch.zeros(3)
    parts = values.split([number for _, number in runs])
    for (source, _), part in zip(runs, parts, strict=True):
        wanted[source] += part.sum()
    torch.testing.assert_close(callback.losses, wanted)
