"""The picture of the layers in ARCHITECTURE.md, read from the imports; what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import clipkit

PACKAGE = Path(clipkit.__file__).parent
LAYERS = [
    {"errors"},
    {"ranges"},
    {
        "tokenizer",
        "tokenizer_training",
        "temperature",
        "heads",
        "distributed",
        "optim",
        "pieces",
        "rank_watch",
        "resume",
        "saving",
        "recipes",
        "arguments",
        "allocations",
        "safe_yaml",
        "own_code",
    },
    {"encoders", "losses", "evaluation"},
    {"data", "strangers", "compiling"},
    {"checkpoint"},
    {"module"},
    {"tracking", "interop"},
    {"suite"},
    {"callbacks"},
    {"parser_errors"},
    {"building"},
    {"check", "sweep"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Loading a model and the command line may reach anything, lazily.
LAZY = {"__init__"}


def room(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path):
    """The rooms that a file imports, also inside functions and for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("clipkit"):
            names = [node.module] if node.module != "clipkit" else []
            names += [f"clipkit.{n.name}" for n in node.names] if node.module == "clipkit" else []
        elif isinstance(node, ast.Import):
            names = [n.name for n in node.names if n.name.startswith("clipkit.")]
        else:
            continue
        for name in names:
            yield name.split(".")[1]


def test_a_room_imports_only_lower_ones():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if room(path) not in LAZY
        for other in imports(path)
        if other != room(path) and other in LEVEL and LEVEL[other] >= LEVEL[room(path)]
    ]
    # The command line calls everything; within tokenizer_training the tokenizer is the lower half.
    wrong = [w for w in wrong if not w.startswith(("cli.py", "tokenizer_training.py"))]
    assert not wrong, wrong


def test_every_room_is_in_the_picture():
    rooms = {room(path) for path in PACKAGE.rglob("*.py")} - LAZY - {"experiments", "assets"}
    assert rooms == set(LEVEL)


BARE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"datasets", "mlflow", "jsonargparse", "ftfy", "pyarrow"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Refuse())
import torch, warnings
import clipkit, clipkit.module, clipkit.losses, clipkit.encoders, clipkit.callbacks
from clipkit.encoders import ConvNet, TextTransformer
from clipkit.heads import LinearHead
from clipkit.losses import InfoNCELoss
from clipkit.module import CLIPModule
from clipkit.temperature import Temperature
from clipkit.tokenizer import Tokenizer
module = CLIPModule(
    image_encoder=ConvNet(image_size=16, widths=(8,)),
    text_encoder=lambda contract: TextTransformer(contract, width=16, depth=1, heads=2),
    tokenizer=Tokenizer("english"), image_head=LinearHead, text_head=LinearHead,
    temperature=Temperature(), loss=InfoNCELoss(), optimizer=torch.optim.AdamW,
    schedule=lambda optimizer, total_steps: None, embed_dim=8,
)
image = module.encode_image(torch.randint(0, 255, (4, 3, 16, 16), dtype=torch.uint8))
text = module.encode_text(module.tokenizer(["a", "red circle", "on", "white"]))
module.loss(image, text, image, text, offset=0, scale=module.scale).loss.backward()
assert all(p.grad is not None for p in module.parameters())
print("trained")
"""


def test_a_training_step_from_a_bare_source_tree():
    """Without datasets, mlflow, jsonargparse, ftfy and pyarrow."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BARE], capture_output=True, text=True, check=False,
        cwd=PACKAGE.parent, env={"PYTHONPATH": str(PACKAGE.parent), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout.strip() == "trained", done.stderr


def test_importing_clipkit_is_cheap():
    code = (
        "import sys, clipkit; heavy = {'torch', 'lightning', 'timm', 'mlflow', 'datasets'};"
        "print(heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
