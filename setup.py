"""Adds the shipped configurations to the wheel, as uvim_fsq/configs; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["uvim_fsq*"]), "uvim_fsq.configs"],
    package_dir={"uvim_fsq.configs": "configs"},
    package_data={"uvim_fsq": ["py.typed"], "uvim_fsq.configs": ["**/*.yaml"]},
)
