"""What is learned, and how it is scored."""

from randlora.tasks.base import Bound, Budget, Splits, Task
from randlora.tasks.commonsense import Commonsense
from randlora.tasks.data_to_text import DataToText
from randlora.tasks.image_captions import ImageCaptions, LabelledCaptions
from randlora.tasks.image_classification import ImageClassification
from randlora.tasks.text_classification import TextClassification

__all__ = [
    "Bound",
    "Budget",
    "Commonsense",
    "DataToText",
    "ImageCaptions",
    "ImageClassification",
    "LabelledCaptions",
    "Splits",
    "Task",
    "TextClassification",
]
