"""Kinds of models, and how each is scored."""

from __future__ import annotations

from ckptavg.tasks.task import Metric as Metric
from ckptavg.tasks.task import Samples as Samples
from ckptavg.tasks.task import Task as Task
