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
    # Bounds above: the next major release of a library may change what it promises. Libraries below 1.0 may do so in any release.
    install_requires=[
        "torch>=2.11,<3",  # custom ops, autograd, the CPU path; plans and kernels use names that torch calls private
        "numpy<3",  # torch's own bridge to arrays
        'triton>=3.6,<4; platform_system == "Linux"',  # the kernels; its launcher and its interpreter are not public
    ],
    extras_require={
        "model": [  # the recommender `awrsr`; the operator does without
            "lightning>=2.5,<3",  # the training loop: checkpoints, several devices, precision, loggers
            "jsonargparse>=4.40,<5",  # the command line with YAML configuration; errors.py reads its messages
            "shtab<2",  # what shells need to complete it
            "polars>=1.32,<3",  # CSV and Parquet; tested with 1.44 and 2.1
            "narwhals>=2,<3",  # tables of pandas and of other libraries, in and out
            "safetensors<1",  # weights that hold no code
            "pooch<2",  # public data: download, checksum, cache
            "requests<3",  # pooch's downloads
            "tqdm<5",  # progress
            "scipy<2",  # significance tests
            "matplotlib<4",  # pictures of the attention
            "jinja2<4",  # the page of awrsr analyse
        ],
        "onnx": ["onnx<2", "onnxscript<1", "onnxruntime<2"],  # awrsr export --format onnx, and its check
        "transformers": ["transformers==5.24.*"],  # awrsr_kernels.integrations.transformers, tested with this release alone
        "search": ["optuna>=4,<6"],  # awrsr search
        "tensorboard": ["tensorboard<3"],  # awrsr train --logger tensorboard
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
            "sphinx<10",  # what PyTorch's own pages are made with
            "myst-parser<6",  # pages in Markdown
            "furo",  # the theme; its versions are dates, which promise nothing
            "sphinx-mathjax-offline<1",  # MathJax in the site, so that formulas need no network
        ],
        "dev": [
            "pytest<10",  # the tests
            "packaging<27",  # the test that constraints and these bounds agree
            "pytest-xdist<4",  # on every core
            "pytest-timeout<3",  # a hanging kernel is a failure
            "pytest-benchmark<6",  # timings per commit
            "hypothesis<7",  # shapes and options nobody thought of
            "matplotlib<4",  # the benchmark's plots
            "tqdm<5",  # its progress bar
            "pandas<4",  # tables of users, which the recommender takes without needing pandas
            "filelock<5",  # one study at a time writes its results
            "accelerate<2",  # transformers' Trainer, and models offloaded to other devices
            "peft<1",  # adapters on refined models
            "ruff<1",  # lint
            "mypy<3",  # types
        ],
    },
)
