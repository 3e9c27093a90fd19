"""Puts the scripts of the repository's top level (`run_*.py`, `app.py`) into the wheel as modules of `jnana`.

Everything else about the package is in setup.cfg; its `package_dir` maps packages, but not single modules.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithScripts(build_py):
    """As `build_py`; the package `jnana` also holds the scripts, so that `python -m jnana.run_sft` works anywhere."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        if package == "jnana":
            scripts = [*sorted(Path().glob("run_*.py")), Path("app.py")]
            modules += [("jnana", script.stem, str(script)) for script in scripts]
        return modules


setup(cmdclass={"build_py": BuildWithScripts})
