"""Metadata and dependencies."""

from setuptools import setup

setup(
    name="awrsr-kernels",
    version="0.1.0",
    description="Fused refined attention for sequential recommendation and other transformers",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=["awrsr_kernels", "awrsr_kernels._triton"],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",  # custom ops, autograd, the CPU path
        "numpy",  # torch's own bridge to arrays
        'triton>=3.6; platform_system == "Linux"',  # the kernels
    ],
    extras_require={
        "dev": [
            "pytest",  # the tests
            "pytest-xdist",  # on every core
            "pytest-timeout",  # a hanging kernel is a failure
            "pytest-benchmark",  # timings per commit
            "hypothesis",  # shapes and options nobody thought of
            "matplotlib",  # the benchmark's plots
            "tqdm",  # its progress bar
            "ruff",  # lint
            "mypy",  # types
        ]
    },
)
