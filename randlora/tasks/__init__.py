"""What is learned, and how it is scored."""

from randlora.tasks.base import Budget, Splits, Task
from randlora.tasks.image_captions import ImageCaptions
from randlora.tasks.image_classification import ImageClassification

__all__ = ["Budget", "ImageCaptions", "ImageClassification", "Splits", "Task"]
