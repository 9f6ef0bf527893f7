"""What ``pip install .`` ships: the plugin ``flsl_d2`` and its configs.

``pretrain/`` and ``tools/`` are used from a checkout.
"""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Ships the top-level ``configs/`` as ``flsl_d2/model_zoo/configs``.

    They are copied into the build, never into the checkout; an editable installation reads the
    checkout's ``configs/``.
    """

    def run(self) -> None:
        super().run()
        if getattr(self, "editable_mode", False):
            return
        target = Path(self.build_lib, "flsl_d2", "model_zoo", "configs")
        # A build folder that is used again may hold configs that are gone.
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree("configs", target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


setup(
    name="flsl-d2",
    version="0.1.0",
    description="Feature-level self-supervised learning (FLSL) for Detectron2: pre-train a plain "
    "ViT, then detect and segment with it",
    long_description=Path("README.md").read_text() if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["flsl_d2", "flsl_d2.*"]),
    package_data={"flsl_d2.visualization": ["page/*"]},
    cmdclass={"build_py": BuildWithConfigs},
    # Only what a working Detectron2 may lack, with lower bounds alone, so that nothing that is
    # there changes version. Deliberately absent:
    #   torch, torchvision  the environment's own build (CUDA, ROCm, CPU) must stay; timm names
    #                       both without a version, which any installed one satisfies
    #   detectron2          not on the package index; tools/install_detectron2.py installs it
    #   opencv              comes under four names that overwrite one another's cv2
    #   scipy and the like  the newest would ask for a newer numpy than the environment has
    install_requires=[
        "fvcore>=0.1.5",
        "hydra-core>=1.1",
        "iopath>=0.1.7",
        "matplotlib",
        "numpy",
        "omegaconf>=2.1",
        "pillow",
        "pycocotools>=2.0.2",
        "pyyaml",
        "safetensors",
        "tabulate",
        "timm>=1.0.21",
        "tqdm",
    ],
    extras_require={
        "pretrain": ["simplejpeg", "tensorboard", "psutil"],
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff", "psutil", "shapely"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
