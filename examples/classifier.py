"""A classifier: HarmonicHead in place of the last linear layer and the cross-entropy, on scikit-learn's digits.

    pip install . scikit-learn
    python examples/classifier.py               # or a file of torch.save((images, classes)): images (N, 64), 0 to 16

Seconds on a CPU. The last lines are the accuracy on images held out, about 98%, and what a softmax does not give:
prototypes lie among the features, so that a prediction is the nearest of them, and they can be compared.
"""

import sys

import torch
from overtone import HarmonicHead
from torch import Tensor, nn

DIM, EPOCHS = 32, 20


def digits() -> tuple[Tensor, Tensor]:
    """Images (N, 64), 0 to 16, and their classes (N,)."""
    if len(sys.argv) > 1:
        return torch.load(sys.argv[1])
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("The digits are scikit-learn's: pip install scikit-learn, or name a file of (images, classes)")
    images, classes = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32), torch.tensor(classes)


class Classifier(nn.Module):
    """64 pixels -> features (N, D) -> 10 prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, DIM))
        self.head = HarmonicHead(10, DIM, distance="euclidean", seed=0)
        self.scale = self.head.feature_length / DIM**0.5  # the length of features that a head starts best with

    def features(self, images: Tensor) -> Tensor:
        """Images (N, 64) -> features (N, D)."""
        return self.network(images / 8 - 1) * self.scale

    def loss(self, images: Tensor, classes: Tensor) -> Tensor:
        """Images (N, 64) and classes (N,) -> their mean loss."""
        return self.head(self.features(images), classes)


def main() -> None:
    """Trains, and prints what the prototypes tell."""
    torch.manual_seed(0)
    images, classes = digits()
    held_out, trained_on = torch.randperm(len(classes)).tensor_split([len(classes) // 4])
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, EPOCHS)
    for epoch in range(EPOCHS):
        for batch in trained_on[torch.randperm(len(trained_on))].split(128):
            loss = model.loss(images[batch], classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        print(f"epoch {epoch + 1:2}  loss {loss.item():.3f}")

    with torch.no_grad():
        features = model.features(images[held_out])
        predicted = model.head.predict(features)
        prototypes = model.head.prototypes
        nearest = torch.cdist(features[:1], prototypes).argmin().item()
        apart = torch.cdist(prototypes, prototypes).fill_diagonal_(torch.inf)
    print(f"held-out image 0 is a {classes[held_out[0]]}; its nearest prototype is that of {nearest}")
    print("nearest other prototype:", ", ".join(f"{own}: {other}" for own, other in enumerate(apart.argmin(1))))
    print(f"held-out accuracy {(predicted == classes[held_out]).double().mean():.1%}")


if __name__ == "__main__":
    main()
