"""Official benchmarks: their files are read, asked with LLaVA-1.5's prompts, and scored by their own rules.

`table.py` lists them; docs/benchmarks.md says what files each needs. `run_evaluate.py --benchmark NAME` runs one.
"""

from .files import BenchmarkFiles
from .question_set import BenchmarkQuestions
from .table import BENCHMARKS, Benchmark


__all__ = ["BENCHMARKS", "Benchmark", "BenchmarkFiles", "BenchmarkQuestions"]
