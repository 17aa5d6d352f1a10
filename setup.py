"""Metadata and dependencies."""

from setuptools import find_packages, setup

setup(
    name="awrsr-kernels",
    version="0.1.0",
    description="Fused refined attention for sequential recommendation and other transformers",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["awrsr*"]),
    package_data={"awrsr": ["py.typed", "analysis/page.html"], "awrsr_kernels": ["py.typed"]},  # both are typed
    entry_points={"console_scripts": ["awrsr = awrsr.__main__:main"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",  # custom ops, autograd, the CPU path
        "numpy",  # torch's own bridge to arrays
        'triton>=3.6; platform_system == "Linux"',  # the kernels
    ],
    extras_require={
        "model": [  # the recommender `awrsr`; the operator does without
            "lightning>=2.5",  # the training loop: checkpoints, several devices, precision, loggers
            "jsonargparse>=4.40",  # the command line with YAML configuration
            "polars>=1.32",  # CSV and Parquet
            "safetensors",  # weights that hold no code
            "pooch",  # public data: download, checksum, cache
            "requests",  # pooch's downloads
            "tqdm",  # progress
            "scipy",  # significance tests
            "matplotlib",  # pictures of the attention
            "jinja2",  # the page of awrsr analyse
        ],
        "onnx": ["onnx", "onnxscript", "onnxruntime"],  # awrsr export --format onnx, and its check
        "transformers": ["transformers==5.24.*"],  # awrsr_kernels.integrations.transformers, tested with this release alone
        "tensorboard": ["tensorboard"],  # awrsr train --logger tensorboard
        # Libraries whose recommenders the adapters refine (`awrsr_kernels.integrations`); constraints-libraries.txt pins what works
        # together.
        "rectools": ["rectools[torch]==0.19.0"],
        "replay": ["replay-rec[torch]==0.22.0"],
        "recbole": [
            "recbole==1.2.1",
            "numpy<2",  # it sets numpy's old names, some of which numpy 2 has dropped
            "setuptools<81",  # pkg_resources, which its ray imports
        ],
        "docs": [  # make docs, and the test that the pages build
            "sphinx",  # what PyTorch's own pages are made with
            "myst-parser",  # pages in Markdown
            "furo",  # the theme
            "sphinx-mathjax-offline",  # MathJax in the site, so that formulas need no network
        ],
        "dev": [
            "pytest",  # the tests
            "pytest-xdist",  # on every core
            "pytest-timeout",  # a hanging kernel is a failure
            "pytest-benchmark",  # timings per commit
            "hypothesis",  # shapes and options nobody thought of
            "matplotlib",  # the benchmark's plots
            "tqdm",  # its progress bar
            "filelock",  # one study at a time writes its results
            "accelerate",  # transformers' Trainer, and models offloaded to other devices
            "peft",  # adapters on refined models
            "ruff",  # lint
            "mypy",  # types
        ],
    },
)
