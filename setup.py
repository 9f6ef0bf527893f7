"""Copy the configs into the wheel; everything else about the package is in ``pyproject.toml``."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Ship the top-level ``configs/`` as ``flsl_d2/model_zoo/configs``.

    The copy goes into the build, never into the checkout: an editable installation reads the
    checkout's ``configs/``.
    """

    def run(self) -> None:
        """Build the package, then add the configs."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "flsl_d2", "model_zoo", "configs")
        # A build folder that is used again may hold configs that no longer exist.
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree("configs", target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


setup(cmdclass={"build_py": BuildWithConfigs})
