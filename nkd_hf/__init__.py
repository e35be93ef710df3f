"""Knowledge distillation of image classifiers for the Hugging Face ecosystem: NKD and USKD (arXiv 2303.13005)."""

__version__ = "0.1.0.dev0"
