"""Six sentences, three classes: train a head on a frozen backbone, then ask it about two sentences it has not seen.

    python pipelines/text_classification.py

The same twice: with the live model in one process, and by way of a cache that lasts, which is what to do with more
than six sentences. Both give the same answer.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import embedcache as ec
from embedcache.cli import reported

CLASSES = ["negative", "neutral", "positive"]
SENTENCES = [
    ("This movie is great!", 2),
    ("Terrible film", 0),
    ("Average movie", 1),
    ("Amazing performance!", 2),
    ("Boring plot", 0),
    ("Decent acting", 1),
]
QUESTIONS = ["Excellent movie!", "Bad acting"]
EPOCHS, RATE = 20, 1e-3


def live() -> None:
    """Backbone and head in one object; the backbone is run once over the sentences, whatever the number of epochs."""
    pipeline = ec.TextClassificationPipeline(num_classes=3)
    pipeline.model.print_parameter_status()
    texts, labels = zip(*SENTENCES, strict=True)
    pipeline.prepare_data(texts, labels)
    pipeline.train(num_epochs=EPOCHS, learning_rate=RATE)
    classes, probabilities = pipeline.predict(QUESTIONS)
    for text, number, row in zip(QUESTIONS, classes, probabilities, strict=True):
        print(f"{text!r}: {CLASSES[number]} (confidence {row[number]:.3f})")


def cached(folder: Path) -> None:
    """The backbone's features on disk, a head trained on them and saved, and predictions from the saved head."""
    rows = [{"text": text, "label": CLASSES[label]} for text, label in SENTENCES]
    cache = ec.extract(rows, output_dir=folder / "sentences.cache", class_names=CLASSES)
    x, y = cache.arrays("train")
    head = ec.train_head(
        x, y, head="linear", spec=ec.TrainSpec(epochs=EPOCHS, learning_rate=RATE), class_names=CLASSES,
        feature=cache.feature(), extraction=cache.spec, probe=cache.probe,
    )  # fmt: skip
    head.save(folder / "head")
    for prediction, text in zip(ec.Predictor.load(folder / "head")(QUESTIONS), QUESTIONS, strict=True):
        print(f"{text!r}: {prediction.label} (confidence {prediction.confidence:.3f})")


def main() -> None:
    live()
    with tempfile.TemporaryDirectory() as folder:
        cached(Path(folder))


if __name__ == "__main__":
    sys.exit(reported(main))
