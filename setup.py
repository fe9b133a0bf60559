"""Packaging: metadata, extras, and the mapping of `patches/` to `semantic_ep.patches`."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "semantic_ep" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

EXTRAS = {
    "torch": ["torch>=2.10"],
    "megatron": [
        "torch>=2.10",
        # Megatron-core needs Python 3.12 from 0.17 on; 0.16.1 is the last one for 3.11.
        'megatron-core==0.16.1; python_version < "3.12"',
        'megatron-core>=0.16.1,<0.20; python_version >= "3.12"',
    ],
    "deepspeed": [
        "torch>=2.10",
        "deepspeed>=0.19.8,<0.20",
        # 5.23 changes a registry that DeepSpeed 0.19's AutoEP reads.
        "transformers>=5.12,<5.23",
        "accelerate>=1.0",
    ],
    "solvers": ["mtkahypar>=1.5"],
    "serve": ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20"],
    "report": ["matplotlib>=3.8", "jinja2>=3.1", "tokenizers>=0.20"],
    "track": ["wandb>=0.31,<0.32", "pillow>=10"],
    "traces": ["pyarrow>=15"],
}
EXTRAS["all"] = sorted({package for packages in EXTRAS.values() for package in packages})
EXTRAS["dev"] = [
    "hypothesis>=6.100",
    "import-linter>=2.1",
    "mypy>=1.10",
    "pre-commit>=3.7",
    "pytest>=8.2",
    "pytest-timeout>=2.3",
    "ruff>=0.6",
]

setup(
    name="semantic_ep",
    version=VERSION,
    description="Semantic expert parallelism for Megatron-core and DeepSpeed, training to serving",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["semantic_ep", "semantic_ep.*"]),
        "semantic_ep.patches",
        *(f"semantic_ep.patches.{name}" for name in find_packages("patches")),
    ],
    package_dir={"semantic_ep": "semantic_ep", "semantic_ep.patches": "patches"},
    package_data={"semantic_ep": ["report/templates/*"], "semantic_ep.patches": ["signatures/*"]},
    install_requires=[
        "numpy>=1.26",
        "scipy>=1.11",
        "pydantic>=2.5",
        "safetensors>=0.4.3",
        "packaging>=23",
        "tqdm>=4.66",
        "rich>=13",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["semantic-ep = semantic_ep.cli:main"]},
)
