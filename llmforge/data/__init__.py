"""Texts to ids on disk to batches; examples to answers that are learned."""

from llmforge.data.dataset import Batch, TokenDataset
from llmforge.data.instructions import BadRecords, InstructionDataset, PackedBatch, RowSummary

__all__ = ["BadRecords", "Batch", "InstructionDataset", "PackedBatch", "RowSummary", "TokenDataset"]
