"""What InsPose-D2 depends on; constraints.txt has the versions that the tests run with."""

from setuptools import find_packages, setup

setup(
    name="inspose_d2",
    version="0.1.0",
    description="InsPose: single-stage multi-person pose estimation, as a Detectron2 project",
    author="The InsPose-D2 authors",
    keywords="pose estimation, keypoints, Detectron2, InsPose",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    license="Apache-2.0",
    # The configs stand at the top, where one looks for them, and are installed in the package.
    package_dir={"": ".", "inspose_d2.model_zoo.configs": "configs"},
    packages=[*find_packages(include=["inspose_d2*"]), "inspose_d2.model_zoo.configs"],
    entry_points={"console_scripts": ["inspose = inspose_d2.cli:main"]},
    package_data={
        "inspose_d2.cli": ["templates/*"],
        "inspose_d2.model_zoo": ["checkpoints/*"],
        "inspose_d2.model_zoo.configs": ["*.yaml", "*/*.yaml"],
    },
    python_requires=">=3.10",
    # Detectron2 is needed too, but is on no package index: `inspose install-detectron2`.
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "fvcore>=0.1.5",
        "pycocotools>=2.0.2",
        "scipy",  # the assignment of tracking
        "numpy",
        "opencv-python",
        "timm>=1.0",  # backbone of the model in the package, HRNet and others
        "pillow",
        "pyyaml",
        "tqdm",
        "matplotlib",
        "tensorboard",
        "jinja2",  # the pages of browse; PyTorch needs it too
        # Three limits that Detectron2 sets; setuptools 82 dropped pkg_resources, which its
        # model zoo imports.
        "iopath>=0.1.7,<0.1.10",
        "omegaconf>=2.1,<2.4",
        "setuptools<81",
    ],
    extras_require={
        "eval": ["faster-coco-eval>=1.8"],  # the same figures sooner
        "export": ["onnx", "onnxruntime", "onnxscript"],
        "heic": ["pi-heif"],  # photographs of iPhones
        "video": ["av>=17"],  # of videos the sound and each frame's own time
        "hub": ["huggingface_hub>=0.23", "safetensors"],
        "web": ["gradio>=6"],
        # The site (make site), and what runs docs/notebook.ipynb.
        "docs": ["mkdocs-material", "mkdocstrings[python]", "nbclient", "ipykernel"],
        "dev": [
            "pytest",
            "pytest-xdist",  # several processes of tests
            "hypothesis",
            "ruff",
            "mypy",
            "playwright",  # its driver alone: the browser is the system's Chromium
            "inspose_d2[docs,eval,export,video]",
            'inspose_d2[web]; python_version >= "3.11"',
        ],
    },
)
