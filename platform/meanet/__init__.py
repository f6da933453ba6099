"""MEANet (arXiv 2109.06440): what is true of the method without a cluster, and the thin homes of its services."""

__version__ = "0.1.0"
