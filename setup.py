"""Installs the package; everything it says stands in settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
settings = config["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="MIT",
    python_requires=">=" + settings["min_python"],
    packages=find_packages(include=["nanochat", "nanochat.*"]),
    package_data={"nanochat": ["*.txt", "*.json", "*.html", "*.yaml", "*.mplstyle"]},
    install_requires=settings["requirements"].split(),
    extras_require={"dev": settings["dev_requirements"].split(), "grading": settings["grading_requirements"].split()},
    entry_points={"console_scripts": settings["console_scripts"].split()},
)
