"""The numbers are those of CLIP_benchmark and scikit-learn where nothing is tied, to 1e-6."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from clipkit.evaluation import (
    build_classifier,
    classification_metrics,
    classify,
    classify_multilabel,
    pairs_of,
    retrieval_metrics,
    retrieve,
    sugarcrepe,
    sugarcrepe_metrics,
    winoground,
    winoground_metrics,
)

pytest.importorskip("clip_benchmark", reason="needs the extra peers")

EXACT = {"abs": 1e-6, "rel": 0}


class Lookup(nn.Module):
    """A model whose pictures and tokens are rows of a table of embeddings."""

    def __init__(self, images: Tensor, texts: Tensor) -> None:
        super().__init__()
        self.images, self.texts = images, texts

    def encode_image(self, images: Tensor) -> Tensor:
        return self.images[images[:, 0, 0, 0].long()]

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.texts[tokens]


def tokens(texts: list[str]) -> Tensor:
    return torch.tensor([int(text.split()[-1]) for text in texts])


def pictures(rows: Tensor) -> Tensor:
    return rows.double().reshape(*rows.shape, 1, 1, 1)


class Batches:
    def __init__(self, batches: list[tuple[Tensor, object]], classes: int = 0) -> None:
        self.batches = batches
        self.dataset = SimpleNamespace(classes=[f"class {which}" for which in range(classes)])

    def __iter__(self) -> Iterator[tuple[Tensor, object]]:
        return iter(self.batches)


def cut(rows: Tensor, size: int = 16) -> list[Tensor]:
    return list(torch.split(rows, size))


# It names the absent classes that were predicted.
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("num_classes", [3, 12])
def test_classification_with_absent_classes_and_many_templates(num_classes: int) -> None:
    from clip_benchmark.metrics import zeroshot_classification as peer

    templates = ["a photo of {c}", "a drawing of {c}", "no {c}"]
    # Each prompt has an embedding of its own, found by the number that its class ends in.
    texts = torch.randn(num_classes * len(templates), 16).double()
    labels = torch.randint(1, num_classes - 1, (150,))
    images = texts[labels] + 2 * torch.randn(150, 16)
    model = Lookup(images, texts)
    calls: list[str] = []

    def tokenizer(prompts: list[str]) -> Tensor:
        calls.extend(prompts)
        return torch.arange(len(calls) - len(prompts), len(calls))

    batches = Batches(
        [(pictures(rows), labels[rows]) for rows in cut(torch.arange(150))], num_classes
    )
    theirs = peer.zero_shot_classifier(
        model, tokenizer, batches.dataset.classes, templates, "cpu", amp=False
    )
    logits, target = peer.run_classification(model, theirs, batches, "cpu", amp=False)
    top5 = logits.topk(min(5, num_classes), 1, True, True)[1]
    # Its `accuracy` does no more than this, and fails with NumPy 2.4.
    expected = {
        "acc1": float((top5[:, 0] == target).double().mean()),
        "acc5": float((top5 == target.unsqueeze(1)).any(dim=1).double().mean()),
        "mean_per_class_recall": peer.balanced_accuracy_score(target, logits.argmax(axis=1)),
    }
    classifier = build_classifier(
        texts, torch.arange(num_classes).repeat_interleave(len(templates)), num_classes
    )
    torch.testing.assert_close(classifier, theirs.T)
    metrics = classification_metrics(classify(images, classifier, labels))
    assert metrics["top1"].value == pytest.approx(expected["acc1"], **EXACT)
    assert metrics["strict_top1"].value == metrics["top1"].value
    assert metrics["mean_class_top1"].value == pytest.approx(
        expected["mean_per_class_recall"], **EXACT
    )
    if num_classes >= 5:
        assert metrics["top5"].value == pytest.approx(expected["acc5"], **EXACT)
    else:
        assert "top5" not in metrics


def test_multilabel_with_absent_classes() -> None:
    from clip_benchmark.metrics.zeroshot_classification import average_precision_per_class
    from sklearn.metrics import average_precision_score

    images, classes = torch.randn(120, 8), torch.randn(9, 8)
    targets = torch.rand(120, 9) < 0.15
    targets[:, [2, 5]] = False
    found = classify_multilabel(images, classes, targets)
    unit = [torch.nn.functional.normalize(rows, dim=1) for rows in (images, classes)]
    scores = unit[0] @ unit[1].T
    peer = average_precision_per_class(scores, targets)
    assert found.classes.tolist() == [0, 1, 3, 4, 6, 7, 8]
    assert found.average_precision.tolist() == pytest.approx(peer[found.classes].tolist(), **EXACT)
    expected = [
        average_precision_score(targets[:, which].numpy(), scores[:, which].numpy())
        for which in found.classes
    ]
    assert found.average_precision.tolist() == pytest.approx(expected, **EXACT)


def test_retrieval_with_many_captions() -> None:
    from clip_benchmark.metrics import zeroshot_retrieval as peer

    counts = torch.randint(1, 6, (50,))  # its loop divides by zero where an image has none
    owners = torch.arange(50).repeat_interleave(counts)
    images = torch.randn(50, 12).double()
    texts = images[owners] + 1.5 * torch.randn(len(owners), 12)
    captions = [
        [f"caption {text}" for text in (owners == row).nonzero().flatten().tolist()]
        for row in range(50)
    ]
    batches = Batches(
        [(pictures(rows), [captions[int(row)] for row in rows]) for rows in cut(torch.arange(50))]
    )
    expected = peer.evaluate(
        Lookup(images, texts), batches, tokens, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    metrics = retrieval_metrics(retrieve(images, texts, pairs_of(owners)))
    for k in (1, 5, 10):
        assert metrics[f"image_to_text_r{k}"].value == pytest.approx(
            expected[f"text_retrieval_recall@{k}"], **EXACT
        )
        assert metrics[f"text_to_image_r{k}"].value == pytest.approx(
            expected[f"image_retrieval_recall@{k}"], **EXACT
        )


def test_retrieval_of_many_to_many_pairs() -> None:
    from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k
    from sklearn.metrics import coverage_error

    images, texts = torch.randn(40, 12).double(), torch.randn(60, 12).double()
    right = torch.rand(40, 60) < 0.05
    right[torch.arange(40), torch.arange(40)] = True
    right[torch.arange(60) % 40, torch.arange(60)] = True
    outcomes = retrieve(images, texts, right.nonzero()[torch.randperm(int(right.sum()))])
    scores = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T
    for side, side_scores, relevant in [
        (outcomes.image_to_text, scores, right),
        (outcomes.text_to_image, scores.T, right.T),
    ]:
        for k in (1, 5, 10):
            recall = recall_at_k(side_scores, relevant, k)
            assert torch.equal(getattr(side, f"hit{k}"), (recall > 0).double())
            if k == 5:
                torch.testing.assert_close(side.recall5.float(), recall)
        # The depth that covers the nearest right answer alone is its rank.
        nearest = side_scores.masked_fill(~relevant, -2).argmax(dim=1)
        alone = torch.nn.functional.one_hot(nearest, side_scores.shape[1])
        assert coverage_error(alone.numpy(), side_scores.numpy()) == pytest.approx(
            float(side.rank.mean())
        )


def test_winoground() -> None:
    from clip_benchmark.metrics import image_caption_selection as peer

    images = torch.randn(200, 6).double()
    texts = images + 1.2 * torch.randn(200, 6)
    rows = torch.arange(200).reshape(100, 2)
    batches = Batches(
        [
            (pictures(some), [[f"caption {text}" for text in pair] for pair in some.tolist()])
            for some in cut(rows)
        ]
    )
    expected = peer.evaluate(Lookup(images, texts), batches, tokens, "cpu", amp=False)
    metrics = winoground_metrics(winoground(images, texts, rows, rows))
    for name, theirs in [("text", "text_acc"), ("image", "image_acc"), ("group", "acc")]:
        assert metrics[name].value == pytest.approx(expected[theirs], **EXACT)
        assert metrics[f"strict_{name}"].value == metrics[name].value
    assert 0 < metrics["group"].value < metrics["text"].value < 1


def test_sugarcrepe() -> None:
    from clip_benchmark.metrics import image_caption_selection as peer

    images, texts = torch.randn(30, 6).double(), torch.randn(160, 6).double()
    of_example, pairs = torch.randint(30, (80,)), torch.arange(160).reshape(80, 2)
    batches = Batches(
        [
            (pictures(some), [[f"caption {text}" for text in pair] for pair in both.tolist()])
            for some, both in zip(cut(of_example), cut(pairs), strict=True)
        ]
    )
    expected = peer.evaluate(Lookup(images, texts), batches, tokens, "cpu", amp=False)
    metrics = sugarcrepe_metrics(sugarcrepe(images, texts, of_example, pairs))
    assert metrics["accuracy"].value == pytest.approx(expected["text_acc"], **EXACT)
    # Its value for a constant model is 100 %, since the right caption stands first.
    constant = Lookup(torch.ones(30, 6), torch.ones(160, 6))
    assert peer.evaluate(constant, batches, tokens, "cpu", amp=False)["text_acc"] == 1.0
    metrics = sugarcrepe_metrics(sugarcrepe(constant.images, constant.texts, of_example, pairs))
    assert metrics["accuracy"].value == 0.5
