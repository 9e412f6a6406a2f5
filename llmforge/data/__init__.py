"""Texts to ids on disk to batches; examples to answers that are learned."""

from llmforge.data.dataset import Batch, MixedDataset, TokenDataset
from llmforge.data.instructions import BadRecords, InstructionDataset, PackedBatch, RowSummary
from llmforge.data.near_duplicates import NearDuplicates

__all__ = [
    "BadRecords",
    "Batch",
    "InstructionDataset",
    "MixedDataset",
    "NearDuplicates",
    "PackedBatch",
    "RowSummary",
    "TokenDataset",
]
