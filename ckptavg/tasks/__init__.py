"""Tasks: the scoring of classifiers, language models and regression models."""

from __future__ import annotations

from ckptavg.tasks.base import Metric as Metric
from ckptavg.tasks.base import Samples as Samples
from ckptavg.tasks.base import Task as Task
