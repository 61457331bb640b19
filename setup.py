"""What pyproject.toml cannot say: the configs in the top folder of a clone are a package of the wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["randlora*"]), "randlora.configs"],
    package_dir={"randlora.configs": "configs"},
)
