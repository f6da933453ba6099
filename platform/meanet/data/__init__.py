"""Images and labels: sources -> one table -> stratified splits."""

from meanet.data.sources import load
from meanet.data.splits import Splits, divide
from meanet.data.table import ImageTable

__all__ = ["ImageTable", "Splits", "divide", "load"]
