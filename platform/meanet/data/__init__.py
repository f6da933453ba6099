"""Images and labels: sources -> one table -> stratified splits."""

from meanet.data.loading import StreamedTable, load
from meanet.data.splits import Splits, divide
from meanet.data.table import Images, ImageTable
from meanet.images import Skipped

__all__ = ["ImageTable", "Images", "Skipped", "Splits", "StreamedTable", "divide", "load"]
