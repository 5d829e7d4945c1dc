"""Recordings of live data planes: Parquet files, transitions for offline training, Minari datasets."""

from .offline import Recording, Transitions, check_dataset_id, load_recording, to_minari
from .recorder import Summary, finish_recording, record, recording_schema

__all__ = [
    "Recording",
    "Summary",
    "Transitions",
    "check_dataset_id",
    "finish_recording",
    "load_recording",
    "record",
    "recording_schema",
    "to_minari",
]
