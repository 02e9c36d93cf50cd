"""Kinds of models, and how each is scored."""

from __future__ import annotations

from ckptavg.tasks.base import Metric as Metric
from ckptavg.tasks.base import Samples as Samples
from ckptavg.tasks.base import Task as Task
