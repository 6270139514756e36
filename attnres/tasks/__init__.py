"""Synthetic tasks. A leaf: nothing here knows of models, training or probes."""

from attnres.tasks.mqar import IGNORE_INDEX, MQAR, SPLITS, RecallBatch

__all__ = ["IGNORE_INDEX", "MQAR", "SPLITS", "RecallBatch"]
