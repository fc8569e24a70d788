"""Package layout, dependencies and metadata; tool settings are in pyproject.toml."""

import ast
import os
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
#: `loaders/` and `savers/` stand at the top of a checkout, as Megatron-LM's plugins do, but such generic names
#: must not land in site-packages: installed, they are part of the library.
PLUGINS = {"megatron_converters.loaders": "loaders", "megatron_converters.savers": "savers"}
#: Page of the repository, for whoever publishes a build of it.
HOME = os.environ.get("MEGATRON_CONVERTERS_URL", "").rstrip("/")
CLASSIFIERS = """
Development Status :: 4 - Beta
Environment :: Console
Intended Audience :: Developers
Intended Audience :: Science/Research
Operating System :: POSIX :: Linux
Programming Language :: Python :: 3
Programming Language :: Python :: 3 :: Only
Programming Language :: Python :: 3.10
Programming Language :: Python :: 3.11
Programming Language :: Python :: 3.12
Programming Language :: Python :: 3.13
Topic :: Scientific/Engineering :: Artificial Intelligence
Topic :: Utilities
Typing :: Typed
"""


def version() -> str:
    """`__version__` of the package, read without importing it: its dependencies may not be there yet."""
    for node in ast.parse((ROOT / "megatron_converters" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return ast.literal_eval(node.value)
    raise RuntimeError("megatron_converters/__init__.py has no __version__")


def requirements(name: str) -> list[str]:
    """The lines of a requirements file that name a package."""
    lines = (line.strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith(("#", "-"))]


def urls() -> dict[str, str]:
    """Pages of the project, as an index of packages shows them; none where the repository has no public page."""
    pages = {"Documentation": "tree/main/docs", "Changelog": "blob/main/CHANGELOG.md", "Issues": "issues"}
    return {"Homepage": HOME, **{name: f"{HOME}/{page}" for name, page in pages.items()}} if HOME else {}


setup(
    name="megatron-converters",
    version=version(),
    description="Move LLM checkpoints between Hugging Face and Megatron-LM, on a CPU, without building a model",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The megatron-converters authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="megatron-lm megatron-core huggingface checkpoint conversion llm torch_dist safetensors mindspore",
    classifiers=CLASSIFIERS.strip().splitlines(),
    project_urls=urls(),
    python_requires=">=3.10",
    packages=[
        *find_packages(
            include=[
                *("megatron_converters", "megatron_converters.*", "model_converter_tool", "model_converter_tool.*"),
                "megatron_layers",
            ]
        ),
        *PLUGINS,
    ],
    package_dir=PLUGINS,
    package_data={
        "megatron_converters": ["py.typed"],
        "megatron_converters.cli": ["reports.schema.json"],
        "megatron_converters.inspection.shard_map": ["page.html", "tooltip.js"],
    },
    entry_points={
        "console_scripts": [
            "megatron-converters = megatron_converters.cli.main:main",
            "megatron-convert = megatron_converters.cli.queue_convert:main",
            "modelconvert = model_converter_tool.cli.main:main",
            "megatron-convert-mlm-to-hf = megatron_converters.cli.mlm_to_hf:main",
        ]
    },
    install_requires=requirements("requirements.txt"),
    extras_require={
        "hf": ["transformers>=4.43", "tokenizers", "sentencepiece", "tiktoken", "protobuf"],
        "bridge": ["megatron-core>=0.16"],
        "logits": ["transformers>=4.43", "megatron-core>=0.16"],
        "test": requirements("requirements-test.txt"),
    },
)
