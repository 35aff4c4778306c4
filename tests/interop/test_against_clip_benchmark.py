"""Others' models on a suite: the metrics that clip-benchmark finds on the same weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from clipkit.data.drawing import draw, sample
from clipkit.interop import open_model
from clipkit.suite.benchmark import benchmark
from clipkit.suite.suite_file import read_suite

pytest.importorskip("clip_benchmark", reason="needs the extra peers")

NAMES = ["red", "green", "blue", "circle", "square", "dog"]
TEMPLATES = ["a photo of the {c}", "many words that make one {c}"]
SUITE = """\
tasks:
  - {task: zeroshot, set: own, data: &own {path: pictures, split: train, class_names: NAMES, templates: TEMPLATES}}
  - {task: retrieval, set: own, data: *own, merge_captions: false}
"""  # noqa: E501


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """30 pictures with a class and two captions of words that the tiny tokenizers know."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    words = ["photo", "large", "red", "green", "blue", "circle", "square", "dog", "cat", "many"]
    rows = []
    lines = []
    for index in range(30):
        texts = [" ".join(rng.permutation(words)[: 4 + index % 5]) for _ in range(2)]
        picture = Image.fromarray(draw(sample(3, "test", index), 40))
        picture.save(folder / "pictures" / f"{index}.png")
        rows.append((picture, index % len(NAMES), texts))
        lines.append(f'{{"file_name": "{index}.png", "captions": ["{texts[0]}", "{texts[1]}"], '
                     f'"label": {index % len(NAMES)}}}')  # fmt: skip
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    suite = SUITE.replace("NAMES", str(NAMES)).replace("TEMPLATES", str(TEMPLATES))
    (folder / "suite.yaml").write_text(suite)
    return folder, rows


class Peer:
    """A model as clip-benchmark calls it: texts for tokens, pictures by their number."""

    def __init__(self, model, rows):
        self.model, self.rows, self.texts = model, rows, []

    def tokenizer(self, texts):
        self.texts += texts
        return torch.arange(len(self.texts) - len(texts), len(self.texts))

    def encode_text(self, tokens):
        return self.library_text([self.texts[int(token)] for token in tokens])

    def encode_image(self, numbers):
        return self.library_image([self.rows[int(number)][0] for number in numbers])


class OpenClipPeer(Peer):
    def library_text(self, texts):
        return self.model.model.encode_text(self.model.tokenizer(texts))

    def library_image(self, pictures):
        pixels = torch.stack([self.model.transform(picture) for picture in pictures])
        return self.model.model.encode_image(pixels)


class TransformersPeer(Peer):
    def __init__(self, folder, rows, kind):
        import transformers

        model = {"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}[kind]
        super().__init__(model.from_pretrained(folder).eval(), rows)
        self.kind = kind
        self.words = transformers.AutoTokenizer.from_pretrained(folder)
        self.processor = transformers.AutoImageProcessor.from_pretrained(folder)

    def library_text(self, texts):
        if self.kind == "clip":
            words = self.words(
                texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
            )
            found = self.model.get_text_features(
                words["input_ids"], attention_mask=words["attention_mask"]
            )
        else:
            words = self.words(
                texts, padding="max_length", truncation=True, max_length=64, return_tensors="pt"
            )
            found = self.model.get_text_features(words["input_ids"])
        return found.pooler_output

    def library_image(self, pictures):
        pixels = self.processor(pictures, return_tensors="pt")["pixel_values"]
        return self.model.get_image_features(pixels).pooler_output


class Numbers(torch.utils.data.Dataset):
    classes = NAMES

    def __init__(self, rows, which):
        self.rows, self.which = rows, which

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return index, self.rows[index][self.which]


def expected(peer, rows):
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    classifier = zeroshot_classification.zero_shot_classifier(
        peer, peer.tokenizer, NAMES, TEMPLATES, "cpu", amp=False
    )
    logits, labels = zeroshot_classification.run_classification(
        peer, classifier, DataLoader(Numbers(rows, 1), batch_size=8), "cpu", amp=False
    )
    # Its own `accuracy` cannot convert on NumPy 2.4: the same line on its logits.
    top = logits.topk(5, 1, True, True).indices == labels[:, None]
    loader = DataLoader(
        Numbers(rows, 2), batch_size=8,
        collate_fn=lambda batch: (torch.tensor([n for n, _ in batch]), [t for _, t in batch]),
    )  # fmt: skip
    retrieval = zeroshot_retrieval.evaluate(
        peer, loader, peer.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    return {
        "top1": top[:, :1].any(1).double().mean().item(),
        "top5": top.any(1).double().mean().item(),
        **{
            f"{ours}_r{k}": retrieval[f"{theirs}_retrieval_recall@{k}"]
            for ours, theirs in (("text_to_image", "image"), ("image_to_text", "text"))
            for k in (1, 5, 10)
        },
    }


@pytest.mark.parametrize("kind", ["open_clip", "clip", "siglip", "own code"])
def test_same_metrics(kind, drawn, open_clip_folder, clip_folder, siglip_folder, code):
    folder, rows = drawn
    if kind in ("open_clip", "own code"):
        opened = open_model(f"open_clip:{open_clip_folder('vit')}", device="cpu")
        peer = OpenClipPeer(opened.model, rows)
    if kind == "own code":
        spec = f"open_clip:{open_clip_folder('vit')}"
        source = "from clipkit.interop import open_model\n\n\n"
        code("mine_of_peers", f"{source}def build(): return open_model({spec!r}).model\n")
        opened = open_model("mine_of_peers:build")
    if kind in ("clip", "siglip"):
        own = clip_folder if kind == "clip" else siglip_folder
        opened = open_model(f"transformers:{own}", device="cpu")
        peer = TransformersPeer(own, rows, kind)
    result = benchmark(opened, read_suite(folder / "suite.yaml"))
    assert not result["failed"]
    found = {
        name: metric["value"]
        for entry in result["tasks"]
        for name, metric in entry["metrics"].items()
    }
    for name, value in expected(peer, rows).items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
