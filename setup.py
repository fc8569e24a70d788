"""Package layout and dependencies; tool settings are in pyproject.toml."""

import ast
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
#: `loaders/` and `savers/` stand at the top of a checkout, as Megatron-LM's plugins do, but such generic names
#: must not land in site-packages: installed, they are part of the library.
PLUGINS = {"megatron_converters.loaders": "loaders", "megatron_converters.savers": "savers"}


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


setup(
    name="megatron-converters",
    version=version(),
    description="Move LLM checkpoints between Hugging Face and Megatron-LM, on a CPU, without building a model",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(
            include=["megatron_converters", "megatron_converters.*", "model_converter_tool", "model_converter_tool.*"]
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
