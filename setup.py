"""What pyproject.toml can't say: the embedded base and the ready configs go into the packages of a wheel.

In a checkout they lie at the top, in assets/ and configs/, where an editable installation finds them too.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SHIPPED = {"assets": "actors/assets", "configs": "pipeline/configs"}


class BuildWithData(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in SHIPPED.items():
                shutil.copytree(ROOT / source, Path(self.build_lib) / target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithData})
