"""Networks: blocks, MEANet's three edge blocks, the cloud's network, and what they cost."""

from meanet.models.cloud import CloudNet
from meanet.models.costs import bytes_moved_of, count_macs, count_parameters, macs_of
from meanet.models.meanet import ExtensionPath, MainBlock, MEANet

__all__ = [
    "CloudNet",
    "ExtensionPath",
    "MEANet",
    "MainBlock",
    "bytes_moved_of",
    "count_macs",
    "count_parameters",
    "macs_of",
]
