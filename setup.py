"""What pyproject.toml cannot say: configs/ is installed inside the package, as tinymim_jax/configs."""

from setuptools import find_packages, setup

CONFIGS = {"tinymim_jax.configs": "configs", "tinymim_jax.configs.study": "configs/study"}

setup(packages=[*find_packages(include=["tinymim_jax*"]), *CONFIGS], package_dir=CONFIGS)
