"""Packaging: metadata, extras, the kernel libraries, `patches/` as `semantic_ep.patches`."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
KERNELS = Path("semantic_ep", "runtime", "kernels")
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
        "deepspeed>=0.19.4,<0.20",
        # 5.23 changes a registry that DeepSpeed 0.19's AutoEP reads.
        "transformers>=5.12,<5.23",
        "accelerate>=1.0",
    ],
    "solvers": ["mtkahypar>=1.5"],
    "serve": [
        "fastapi>=0.115",
        "uvicorn>=0.30",
        "jinja2>=3.1",
        "prometheus-client>=0.20",
        "psutil>=5.9",
    ],
    "report": ["matplotlib>=3.8", "jinja2>=3.1", "tokenizers>=0.20"],
    "track": ["wandb>=0.31,<0.32", "pillow>=10"],
    "traces": ["pyarrow>=15"],
}
EXTRAS["all"] = sorted({package for packages in EXTRAS.values() for package in packages})
EXTRAS["dev"] = [
    "build>=1.2",
    "httpx>=0.27",
    "hypothesis>=6.100",
    "import-linter>=2.1",
    "locust>=2.40",
    "mypy>=1.10",
    # Machine code of the kernels; of use where nvcc is.
    'nvidia-cuda-cuobjdump>=13.2; sys_platform == "linux"',
    'nvidia-cuda-nvdisasm>=13.2; sys_platform == "linux"',
    "openai>=1.40",
    "pre-commit>=3.7",
    "pytest>=8.2",
    "pytest-timeout>=2.3",
    "ruff>=0.6",
    "schemathesis>=4.1",
    "twine>=6",
]


class BuildWithKernels(build_py):
    """Also compiles the kernel libraries for which this machine has a compiler.

    Not in an editable install: there, as in a wheel without libraries, they are built at first use.
    """

    def run(self) -> None:
        """Copy the package, then build into the copy."""
        super().run()
        if not self.editable_mode:
            self._build_kernels(Path(self.build_lib) / KERNELS / "lib")

    def _build_kernels(self, directory: Path) -> None:
        try:
            build = _load_build_module()
        except ImportError as error:
            self.warn(f"kernel libraries are not built on {sys.platform}: {error}")
            return
        outcomes = [build.build_library(flavour, directory) for flavour in ("cuda", "emulator")]
        for outcome in outcomes:
            if outcome.path is None:
                self.warn(f"the {outcome.flavour} kernel library is left out: {outcome.reason}")
            else:
                self.announce(f"{outcome.path.name}: {outcome.reason}", level=logging.INFO)
        # Locks, and libraries that an earlier build made of other sources.
        for path in set(directory.glob("*")) - {outcome.path for outcome in outcomes}:
            path.unlink()


class PlatformWheel(bdist_wheel):
    """Tags a wheel `py3-none-<platform>` if it holds a library, else `py3-none-any`."""

    def run(self) -> None:
        """Build first: only then is it known whether there is a library."""
        if not self.skip_build:
            self.run_command("build")
        build_lib = Path(self.get_finalized_command("build_py").build_lib)
        if any((build_lib / KERNELS / "lib").glob("*.so")):
            self.root_is_pure = False
            # What setuptools asks to tell a package for one platform: it has no name for libraries.
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Libraries are loaded with ctypes: they know nothing of the interpreter."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


def _load_build_module() -> ModuleType:
    """`semantic_ep.runtime.kernels.build`, without importing the package and what it needs."""
    name = "semantic_ep_kernel_build"
    spec = importlib.util.spec_from_file_location(name, HERE / KERNELS / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclass looks its own module up
    spec.loader.exec_module(module)
    return module


setup(
    name="semantic_ep",
    version=VERSION,
    description="Semantic expert parallelism for Megatron-core and DeepSpeed, training to serving",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # All tests run on 3.11; on the others those of what needs no torch (test_other_pythons.py).
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=[
        *find_packages(include=["semantic_ep", "semantic_ep.*"]),
        "semantic_ep.patches",
        *(f"semantic_ep.patches.{name}" for name in find_packages("patches")),
    ],
    package_dir={"semantic_ep": "semantic_ep", "semantic_ep.patches": "patches"},
    package_data={
        "semantic_ep": ["report/templates/*"],
        "semantic_ep.patches": ["signatures/*", "autoload/*", "README.md"],
        "semantic_ep.runtime.kernels": ["README.md", "csrc/*", "csrc/emu/*"],
    },
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel},
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
